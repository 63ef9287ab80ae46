"""Runs as they leave their facts and their ledger, for tests of the report.

The extracts come out of a real ledger; the numbers are small enough to be accounted fast.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.privacy.events import Event, Gaussian, PoissonGaussian, Relation, Unit
from fedtune.privacy.facts import (
    Clip,
    Data,
    Deployment,
    Facts,
    Model,
    Noise,
    Omission,
    Ran,
    Sampling,
    Tuning,
)
from fedtune.privacy.ledger import Claim, Ledger, open_ledger
from fedtune.privacy.report_ledger import Extract

ROLES = (
    "GLOUCESTER", "DUKE VINCENTIO", "KING RICHARD III", "MENENIUS", "ROMEO", "CORIOLANUS",
    "JULIET", "QUEEN MARGARET", "PETRUCHIO",
)  # fmt: skip
VERSIONS = {"fedtune": "0.1.0", "dp-accounting": "0.6.0", "torch": "2.13.0", "flwr": "1.39.0"}
BASE = Model(
    base="stories260K",
    fingerprint="3f1c8b0e5d7a4496a2f0c1d9e8b7a6354d2c1b0a9f8e7d6c5b4a39281706f5e4",
    adapter="lora, rank 8",
    parameters=41_984,
)
STEP = PoissonGaussian(0.05, 2.2)
ROUND = PoissonGaussian(0.1, 3.0)


@dataclass(frozen=True)
class Run:
    """What a run leaves."""

    facts: Facts
    extract: Extract
    ledger: Ledger

    def save(self, path: Path) -> Path:
        """Write the two files into a run folder."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "privacy_facts.json").write_text(self.facts.model_dump_json())
        whole = self.ledger.extract(self.facts.job)
        (path / "ledger.json").write_text(json.dumps(whole))
        (path / "run.json").write_text('{"status": "finished"}')
        return path


def examples(**changes: Any) -> Ran:
    """Noise at each client, Poisson batches."""
    return Ran(
        **{
            "unit": Unit.EXAMPLE, "relation": Relation.ADD_OR_REMOVE_ONE, "noised_by": "client",
            "sampling": Sampling(
                scheme="poisson", probability=STEP.sampling_probability, population=400,
                flipped_by="client", source="os-entropy-aes256-ctr",
            ),
            "clip": Clip(rule="flat", norm=0.5),
            "noise": Noise(multiplier=STEP.noise_multiplier, source="os-entropy-aes256-ctr",
                           secure=True, grid=2.4e-6, margin=0.0012),
            "denominator": 20.0, "rounds": 4, "steps_per_round": 15.0, "delta": 1e-5,
            "target_epsilon": 8.0, "units": 400,
            "labels": {f"shakespeare/{role}": role for role in ROLES},
        } | changes
    )  # fmt: skip


def clients(**changes: Any) -> Ran:
    """Noise at the server, Poisson cohorts of 312 roles."""
    return Ran(
        **{
            "unit": Unit.CLIENT, "relation": Relation.ADD_OR_REMOVE_ONE, "noised_by": "server",
            "sampling": Sampling(
                scheme="poisson", probability=ROUND.sampling_probability, population=312,
                flipped_by="server", source="os-entropy-aes256-ctr",
            ),
            "clip": Clip(rule="quantile", norm=0.3, note="target 0.5"),
            "noise": Noise(multiplier=ROUND.noise_multiplier, source="os-entropy-aes256-ctr",
                           secure=True, grid=1.1e-6),
            "denominator": 31.2, "rounds": 60, "delta": 1e-4, "target_epsilon": 8.0, "units": 312,
        } | changes
    )  # fmt: skip


def facts(name: str, *ran: Ran, **changes: Any) -> Facts:
    """Facts of a run on Shakespeare's roles."""
    return Facts(
        **{
            "name": name, "job": f"{name}-20261121-101500",
            "finished": "2026-11-21T10:41:07+00:00", "versions": VERSIONS, "mechanisms": ran,
            "model": BASE,
            "data": Data(
                description="Tiny Shakespeare, speaking roles", clients=len(ROLES),
                partition="by column 'role'; clients hold disjoint rows",
            ),
            "metrics": "withheld",
            "tuning": Tuning(how="Clip norm and learning rate were taken from runs on E2E NLG, "
                             "which is public", private=True),
            "covered": ("the adapter of every round, and what is computed from them",
                        "the bits of the quantile rule, in the same release"),
            "not_covered": (Omission(what="How many rows each client holds",
                                     why="only a public nominal number was used; rows stay home"),),
            "deployment": Deployment(curator="Folio Archive", purpose="a style model for editors",
                                     product="LoRA adapter", contact="privacy@folio.example"),
        } | changes
    )  # fmt: skip


def spend(
    ledger: Ledger,
    job: str,
    unit: Unit,
    plan: Mapping[str, tuple[Event, int, int]],
    relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    budget: tuple[float, float] | None = None,
) -> None:
    """Charge each data set: (event, rounds, releases in each)."""
    for dataset, (event, rounds, count) in plan.items():
        account = ledger.account(dataset, unit, relation)
        if budget is not None and account.epsilon is None:
            account = ledger.set_budget(account, *budget, "owner", "agreed")
        for number in range(1, rounds + 1):
            ledger.release(ledger.reserve(account, Claim(job, number, 0, event, count)))


def finished(given: Facts, ledger: Ledger) -> Run:
    """Return a run whose releases are in the ledger."""
    return Run(given, Extract.model_validate(ledger.extract(given.job)), ledger)


def example_run(folder: Path) -> Run:
    """Nine clients; two of them missed rounds; an earlier job spent on all of them."""
    ledger = open_ledger(folder / "examples.db", actor="test")
    given = facts("folio-example", examples(), ledger=str(folder / "examples.db"))
    missed = {"ROMEO": 2, "PETRUCHIO": 2}
    spend(ledger, "pilot-20261102-090000", Unit.EXAMPLE,
          {f"shakespeare/{role}": (STEP, 1, 10) for role in ROLES}, budget=(8.0, 1e-5))  # fmt: skip
    spend(ledger, given.job, Unit.EXAMPLE,
          {f"shakespeare/{role}": (STEP, missed.get(role, 4), 15) for role in ROLES})  # fmt: skip
    return finished(given, ledger)


def client_run(folder: Path) -> Run:
    """312 clients in Poisson cohorts."""
    ledger = open_ledger(folder / "clients.db", actor="test")
    given = facts(
        "folio-client",
        clients(),
        data=Data(description="Tiny Shakespeare, speaking roles", clients=312),
        metrics="not-private",
        deployment=Deployment(),
    )
    spend(ledger, "sweep-3-20261119-140000", Unit.CLIENT, {"shakespeare": (ROUND, 5, 1)})
    spend(ledger, given.job, Unit.CLIENT, {"shakespeare": (ROUND, 6, 10)})
    return finished(given, ledger)


def both_runs(folder: Path) -> Run:
    """Noise at the clients and at the server: two statements. Everybody takes part."""
    ledger = open_ledger(folder / "both.db", actor="test")
    server = clients(
        relation=Relation.REPLACE_SPECIAL,
        sampling=Sampling(scheme="everyone", flipped_by="server"),
        clip=Clip(rule="flat", norm=0.3),
        noise=Noise(multiplier=6.0, source="os-entropy-aes256-ctr", secure=True, grid=1.1e-6),
        denominator=312.0,
    )
    given = facts("folio-both", examples(), server, per_person=3)
    spend(ledger, given.job, Unit.EXAMPLE,
          {f"shakespeare/{role}": (STEP, 4, 15) for role in ROLES})  # fmt: skip
    spend(ledger, given.job, Unit.CLIENT, {"shakespeare": (Gaussian(6.0), 6, 10)},
          Relation.REPLACE_SPECIAL, budget=(10.0, 1e-4))  # fmt: skip
    return finished(given, ledger)


def seeded_run(folder: Path) -> Run:
    """Insecure: the noise came from a seed."""
    ledger = open_ledger(folder / "seeded.db", actor="test")
    ran = examples(
        rounds=1,
        noise=Noise(multiplier=STEP.noise_multiplier, source="insecure-seeded", secure=False),
    )
    given = facts("folio-seeded", ran, ended="interrupted")
    spend(ledger, given.job, Unit.EXAMPLE, {"shakespeare/ROMEO": (STEP, 1, 15)})
    return finished(given, ledger)

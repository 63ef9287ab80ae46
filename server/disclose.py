"""What a finished run says about its privacy: facts and the ledger's own extract.

``RUN/privacy_facts.json`` holds what the settings and the server know,
``RUN/ledger.json`` what was spent. Epsilons are in neither: the report computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

from fedtune.adapters import trainable
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import write_json
from fedtune.pool.codec import COEFFICIENTS
from fedtune.pool.groups import released
from fedtune.privacy.events import Unit
from fedtune.privacy.facts import (
    Clip,
    Data,
    Facts,
    Model,
    Noise,
    Omission,
    Ran,
    Sampling,
    Steering,
    read_facts,
)
from fedtune.privacy.forecast_policy import FIXED, begin, outline
from fedtune.privacy.lattice import grid_of
from fedtune.privacy.ledger import open_ledger
from fedtune.privacy.plan import (
    Promise,
    dataset_name,
    honest_survivors,
    ledger_place,
    noise_source,
    promises,
)
from fedtune.privacy.report import build, card_lines, summary
from fedtune.privacy.report_ledger import read_extract
from fedtune.privacy.rldp.shape import Shape
from fedtune.privacy.server_view import crossing_of
from fedtune.privacy.summing import summing_of
from fedtune.server.run_folder import RunFolder
from fedtune.server.tuned import Tuned

__all__ = ["Ended", "disclose", "facts_of", "sizes_of", "statement_of"]

_PACKAGES = ("fedtune", "dp-accounting", "torch", "flwr", "peft", "cryptography")
_SCHEMES: dict[str, Literal["everyone", "poisson", "truncated-poisson"]] = {
    "everyone": "everyone", "poisson": "poisson", "truncated-poisson": "truncated-poisson",
}  # fmt: skip
Ended = Literal["finished", "budget-exhausted", "interrupted", "failed"]


def disclose(tuned: Tuned, folder: RunFolder, ended: Ended = "finished") -> None:
    """Write the facts and the ledger's extract of a run that promised something, or was split."""
    config = tuned.config
    if not (config.privacy.on or config.tuning.cut):
        return
    extract: Mapping[str, Any] = {"schema": 1, "job": folder.job(), "accounts": []}
    if config.privacy.on:
        extract = _extract(config, folder)
        _require_all(config, extract, _rounds(folder))
    write_json(folder.path / "ledger.json", extract)
    facts = facts_of(tuned, folder, ended)
    write_json(folder.path / "privacy_facts.json", facts.model_dump(mode="json"))


def _extract(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Return what the ledgers hold: this machine's, and of clients elsewhere the server's copy."""
    if not folder.books.exists():
        return open_ledger(ledger_place(config)).extract(folder.job(), compact=True)
    extract = open_ledger(folder.books).extract(folder.job(), compact=True)
    if config.privacy.client is not None:
        central = open_ledger(ledger_place(config)).extract(folder.job(), compact=True)
        extract["accounts"] = [*extract["accounts"], *central["accounts"]]
    return extract


def statement_of(folder: RunFolder) -> tuple[dict[str, Any], list[str]]:
    """Return ``privacy.json`` and the lines of the model card for a run."""
    file = folder.path / "privacy_facts.json"
    config = folder.config()
    if not (config.privacy.on or config.tuning.cut):
        return {
            "schema": 2,
            "differential_privacy": False,
            "statement": "Trained without differential privacy. No bound on what it reveals.",
        }, []
    extract = read_extract(folder.path / "ledger.json")
    report = build(read_facts(file), extract, details=False)
    return summary(report), card_lines(report) if config.privacy.on else []


def facts_of(tuned: Tuned, folder: RunFolder, ended: Ended = "finished") -> Facts:
    """Return what a run knows about its privacy that its ledger does not."""
    config = tuned.config
    rounds = _rounds(folder)
    insecure = config.privacy.insecure_seeded_noise
    ran = tuple(_ran(tuned, promise, rounds) for promise in promises(config))
    covered = ["the model of every round, and what is computed from it"]
    # Beside a promise about clients, the choices of single clients are nobody's to see.
    whole = [one for one in ran if one.unit is Unit.CLIENT] or ran
    if any(one.clip.policy is not None for one in whole):
        covered.append("what the clipping policy chose: it follows from those releases")
    return Facts(
        name=config.name,
        job=folder.job(),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        ended=ended,
        versions={name: version(name) for name in _PACKAGES},
        mechanisms=ran,
        covered=tuple(covered),
        model=Model(
            base=config.model.base if config.model.base.startswith("fedtune:") else "local model",
            revision=config.model.revision,
            fingerprint=tuned.fingerprint,
            adapter=_trained(config),
            parameters=sum(p.numel() for p in trainable(tuned.model).values()),
        ),
        data=_data(config, folder),
        metrics="withheld" if config.privacy.on else "not-private",
        not_covered=_not_covered(config),
        warnings=("noise and coins came from the seed of the experiment: whoever knows it can "
                  "take the noise away",) if insecure else (),
        ledger=ledger_place(config) if config.privacy.on else "",
        crossing=crossing_of(config) if config.tuning.cut else None,
    )  # fmt: skip


def _rounds(folder: RunFolder) -> int:
    return max((int(row["round"]) for row in folder.metrics()), default=0)


def _require_all(config: Config, extract: Mapping[str, Any], rounds: int) -> None:
    """Refuse a ledger that was charged for less than there were rounds."""
    for promise in promises(config):
        charged = sum(
            group["count"]
            for account in extract["accounts"] if account["unit"] == promise.unit.value
            for group in account["groups"]
        )  # fmt: skip
        # With secret cohorts a round may have had no client to charge examples for.
        least = 0 if promise.unit is Unit.EXAMPLE and config.privacy.client else rounds
        # Behind a filter, and with levels in any order, a round is one charge.
        each = promise.charge.count
        if charged < least * each:
            raise FedtuneError(
                f"the ledger knows of {charged} charges ({promise.unit.value}), "
                f"{rounds} rounds had at least {least * each}",
                hint="it is not the ledger that this run was charged to; bring that one back",
                code=ExitCode.LEDGER,
            )


def _ran(tuned: Tuned, promise: Promise, rounds: int) -> Ran:
    config, settings, mechanism = tuned.config, promise.settings, promise.mechanism
    source = noise_source(config)
    by: Literal["client", "server"] = "client" if promise.unit is Unit.EXAMPLE else "server"
    shared = getattr(settings, "noise_at", "") == "clients"
    scheme = _SCHEMES[settings.sampler]
    sizes = sizes_of(tuned, promise)
    shape = begin(promise, sizes).shape()
    # Sums of whole numbers are exact; the bits of the quantile rule are added as floats.
    coefficients = not config.tuning.by_gradient and settings.clip != "quantile"
    whole = promise.unit is Unit.CLIENT or coefficients
    return Ran(
        unit=promise.unit,
        relation=promise.relation,
        noised_by="clients" if shared else by,
        honest=honest_survivors(config) if shared else None,
        colluding=config.federation.secure.colluding if shared and config.federation.secure else 0,
        sampling=Sampling(
            scheme=scheme, probability=mechanism.sampler.rate,
            population=settings.population if scheme == "truncated-poisson" else None,
            cap=getattr(settings, "cap", 0) or None, flipped_by=by,
            source=source.name, secure=source.secure,
        ),
        clip=_clip(promise, sizes, shape),
        noise=Noise(
            multiplier=promise.least_noise, source=source.name, secure=source.secure,
            law=mechanism.law,
            grid=_grid(tuned, promise) if shared else _finest(shape, sizes),
            margin=0.0 if whole else mechanism.margin,
        ),
        denominator=mechanism.denominator,
        rounds=rounds,
        steps_per_round=float(promise.releases),
        delta=promise.delta,
        target_epsilon=settings.epsilon or None,
        units=settings.population,
    )  # fmt: skip


def sizes_of(tuned: Tuned, promise: Promise) -> dict[str, int]:
    """Return how many numbers each tensor of a release has: parameters, or coefficients."""
    sizes = {name: p.numel() for name, p in trainable(tuned.model).items()}
    numbers = released(tuned.config, sum(sizes.values()), promise.unit)
    return {COEFFICIENTS: numbers} if numbers != sum(sizes.values()) else sizes


def _finest(shape: Shape, sizes: Mapping[str, int]) -> float:
    """Return the smallest grid step of a release's blocks."""
    return min(
        grid_of(norm, sum(sizes[name] for name in names))
        for names, norm in zip(shape.names, shape.norms, strict=True)
    )


def _clip(promise: Promise, sizes: Mapping[str, int], shape: Shape) -> Clip:
    """Return the clipping rule, and what its policy took of each release for its sensors."""
    settings = promise.settings
    pairs = zip(shape.names, shape.norms, strict=True)
    steering = None
    if settings.clip not in FIXED:
        made = outline(promise, sizes)
        shares = {name: made[name] for name in ("mode", "reward", "bits", "loss", "held_out")}
        moving = settings.rldp.noise if settings.rldp else "constant"
        steering = Steering(**shares, noise=moving)
    return Clip(
        rule=settings.clip, norm=settings.clip_norm, policy=steering,
        blocks={", ".join(names): norm for names, norm in pairs} if len(shape.names) > 1 else {},
    )  # fmt: skip


def _grid(tuned: Tuned, promise: Promise) -> float:
    """Return the step of secure sums: coarser, so that they fit 32 bits."""
    shapes = {name: value.shape for name, value in tuned.start().adapter.items()}
    if tuned.config.tuning.seeded:
        shapes = {COEFFICIENTS: (tuned.config.tuning.pool.size,)}
    return summing_of(tuned.config, shapes, promise.settings.population).grid


def _trained(config: Config) -> str:
    """Say what was tuned, and by which numbers where only those travel."""
    tuning = config.tuning
    if not tuning.seeded:
        how = {"backprop": "", "mezo": " by mezo", "sfprompt": " through a cut model"}
        return tuning.adapter + how[tuning.method]
    engine = tuning.pool.engine if tuning.method == "seedpool" else "probes"
    return (
        f"{tuning.adapter} by {tuning.method} ({engine}; {tuning.pool.size:,} coefficients of "
        "public directions)"
    )


def _data(config: Config, folder: RunFolder) -> Data:
    split = config.data.partition
    how = {
        "column": f"rows with the same '{split.column}' are one client",
        "iid": "rows were dealt out at random",
        "dirichlet": f"rows were dealt out by label, Dirichlet({split.alpha:g})",
        "size": "rows were dealt out into clients of unequal size",
        "owner": "every owner's own text is one client",
    }[split.by]
    if config.privacy.client:
        population = config.privacy.client.population
    else:
        population = split.clients or len({row["client"] for row in folder.client_rows()})
    return Data(
        description=dataset_name(config), clients=population,
        partition=f"{how}; a row is in one client only",
    )  # fmt: skip


def _not_covered(config: Config) -> tuple[Omission, ...]:
    """Return what this run leaves out besides what every run does (``trust.omissions``)."""
    found = [
        Omission(
            what="the choice of settings",
            why="chosen by the operator"
            + ("; other runs on the same data are in the ledger" if config.privacy.on else ""),
        ),
    ]
    found.append(
        Omission(
            what="how rows became clients",
            why="taken as given: the bound is about rows of one client after the split",
        )
    )
    if config.privacy.example is not None and config.privacy.client is not None:
        found.append(
            Omission(
                what="how often a client took part, in the example statement",
                why="its count of releases shows it; publish the client statement alone where "
                "that matters",
            )
        )
    return tuple(found)

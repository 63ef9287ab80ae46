"""From facts and a ledger's extract to a statement that is true of what ran."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import accounting
from fedtune.privacy.costs import bare, cost, events_of, guess, within
from fedtune.privacy.events import (
    Event,
    Gaussian,
    Laplace,
    PoissonGaussian,
    PoissonLaplace,
    Relation,
    TruncatedPoissonGaussian,
    Unbounded,
    Unit,
    to_json,
)
from fedtune.privacy.facts import Clip, Facts, Noise, Ran, Sampling, ran_from, read_facts
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.noise import InsecureSeededNoise, SecureNoise
from fedtune.privacy.recompute import lines
from fedtune.privacy.report_ledger import Extract, read_extract
from fedtune.privacy.sampling import Everyone, Poisson, TruncatedPoisson
from fedtune.privacy.statement import ROWS, Statement, states
from tests.privacy import report_runs as runs

ADD, SPECIAL = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_SPECIAL


def listed(groups: Mapping[Event, int]) -> list[dict[str, Any]]:
    return [{"event": to_json(event), "count": count} for event, count in groups.items()]


def extract(given: Facts, unit: Unit, accounts: Mapping[str, Mapping[Event, int]]) -> Extract:
    """The extract of a ledger with these charges."""
    return Extract.model_validate(
        {
            "schema": 1, "job": given.job,
            "accounts": [
                {"dataset": name, "unit": unit, "relation": given.mechanisms[0].relation,
                 "budget": None, "head": "0" * 64, "entries": [], "groups": listed(groups),
                 "all_jobs": [], "all_groups": listed(groups)}
                for name, groups in accounts.items()
            ],
        }
    )  # fmt: skip


def stated(given: Facts, accounts: Mapping[str, Mapping[Event, int]]) -> Statement:
    (found,) = states(given, extract(given, given.mechanisms[0].unit, accounts))
    return found


CENTRAL = runs.facts("one", runs.clients())
LOCAL = runs.facts("many", runs.examples())


# ---------------------------------------------------------------- facts


def test_facts_survive_json_both_ways(tmp_path: Path) -> None:
    file = tmp_path / "privacy_facts.json"
    file.write_text(LOCAL.model_dump_json())
    assert read_facts(file) == LOCAL
    assert json.loads(file.read_text())["mechanisms"][0]["unit"] == "example"


@pytest.mark.parametrize(
    "broken",
    [
        {"scheme": "truncated-poisson", "probability": 0.1},
        {"scheme": "everyone", "probability": 0.5},
        {"scheme": "shuffled"},
        {"scheme": "poisson", "probability": 0.0},
        {"scheme": "poisson", "probability": float("nan")},
        {"scheme": "poisson", "surprise": 1},
    ],
)
def test_a_sampler_that_cannot_be_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Sampling(**broken)


@pytest.mark.parametrize("text", ["", "{", '{"version": 2}', "[]"])
def test_unreadable_files_say_which(tmp_path: Path, text: str) -> None:
    for name, read in (("privacy_facts.json", read_facts), ("ledger.json", read_extract)):
        (tmp_path / name).write_text(text)
        with pytest.raises(FedtuneError, match=name) as caught:
            read(tmp_path / name)
        assert caught.value.code is ExitCode.RUN_FOLDER
    with pytest.raises(FedtuneError, match="absent"):
        read_facts(tmp_path / "absent.json")


def test_times_are_kept_in_utc() -> None:
    east = runs.facts("east", finished="2026-11-21T12:41:07+02:00")
    assert east.finished == "2026-11-21T10:41:07+00:00"
    for wrong in ("2026-11-21T12:41:07", "yesterday"):
        with pytest.raises(ValidationError):
            runs.facts("odd", finished=wrong)


def test_one_unit_has_one_mechanism() -> None:
    with pytest.raises(ValidationError, match="one account"):
        runs.facts("twice", runs.clients(), runs.clients(rounds=3))


def test_an_account_cannot_have_less_over_all_jobs_than_in_this_one() -> None:
    given = extract(CENTRAL, Unit.CLIENT, {"d": {runs.ROUND: 5}}).model_dump(by_alias=True)
    given["accounts"][0]["all_groups"][0]["count"] = 4
    with pytest.raises(ValidationError, match="this one 5"):
        Extract.model_validate(given)


def test_reservations_that_never_ended_are_counted() -> None:
    reserve = {"kind": "reserve", "seq": 3, "count": 7}
    done = [{"kind": "reserve", "seq": 1, "count": 4}, {"kind": "release", "reservation": 1}]
    base = {"dataset": "d", "unit": "client", "relation": ADD, "head": "", "groups": []}
    whole = Extract.model_validate(
        {"schema": 1, "job": "j", "accounts": [base | {"entries": [*done, reserve]}]}
    )
    assert whole.accounts[0].unfinished == 7
    runs_of = [
        {"count": 2, "times": 3, "state": "reserved"},
        {"count": 9, "times": 1, "state": "x"},
    ]
    compact = Extract.model_validate(
        {"schema": 1, "job": "j", "accounts": [base | {"runs": runs_of}]}
    )
    assert compact.accounts[0].unfinished == 6
    again = Extract.model_validate(compact.model_dump(mode="json", by_alias=True))
    assert again == compact


@pytest.mark.parametrize("unit", list(Unit))
def test_facts_come_from_the_mechanism_that_ran(unit: Unit) -> None:
    mechanism = Mechanism(unit, SPECIAL, TruncatedPoisson(0.1, 300, 48), 1.5, 30.0, micro_batch=1)
    blocks = mechanism.blocks_weighted(
        {("a", "b"): 0.3, ("c",): 0.4}, {("a", "b"): 0.5, ("c",): 0.5}
    )
    described = mechanism.describe(blocks, {"a": 10, "b": 10, "c": 5}, SecureNoise())
    ran = ran_from(described, rule="per-adapter", rounds=3, delta=1e-5, units=300)
    assert (ran.unit, ran.relation, ran.denominator) == (unit, SPECIAL, 30.0)
    assert (ran.sampling.scheme, ran.sampling.probability) == ("truncated-poisson", 0.1)
    assert (ran.sampling.population, ran.sampling.cap) == (300, 48)
    assert math.isclose(ran.clip.norm, 0.5)
    assert ran.clip.blocks == {"a": 0.3, "c": 0.4}
    assert ran.noise.secure
    assert ran.noised_by == ("client" if unit is Unit.EXAMPLE else "server")
    assert (ran.noise.margin is not None) == (unit is Unit.EXAMPLE)
    seeded = mechanism.describe(blocks, {"a": 10, "b": 10, "c": 5}, InsecureSeededNoise(1))
    ran = ran_from(seeded, rule="per-adapter", rounds=3, delta=1e-5, units=300)
    assert not ran.noise.secure
    assert not ran.sampling.secure
    for sampler, name in ((Everyone(), "everyone"), (Poisson(0.1), "poisson")):
        plain = Mechanism(unit, ADD, sampler, 1.5, 30.0)
        found = plain.describe(plain.blocks_flat(("a",), 1.0), {"a": 1}, SecureNoise())
        assert ran_from(found, rule="flat", rounds=1, delta=1e-5, units=9).sampling.scheme == name


# ---------------------------------------------------------------- the bound


def test_the_bound_is_that_of_the_events_in_the_ledger() -> None:
    found = stated(CENTRAL, {"shakespeare": {runs.ROUND: 60}})
    spent = accounting.spent({runs.ROUND: 60}, 1e-4, ADD)
    assert (found.epsilon, found.epsilon_rdp) == (spent.epsilon, spent.epsilon_rdp)
    assert (found.releases, found.accountant, found.mu) == (60, spent.accountant, spent.mu)
    assert found.holds
    assert f"ε = {math.ceil(spent.epsilon * 10_000) / 10_000}" in found.formal
    assert "all 60 rounds together" in found.formal
    assert "all data of one client being there or not" in found.formal


def test_the_bound_without_sampling_stands_beside_with_its_condition() -> None:
    found = stated(CENTRAL, {"shakespeare": {runs.ROUND: 60}})
    plain = accounting.spent({Gaussian(3.0): 60}, 1e-4, ADD)
    assert found.unsampled == plain.epsilon > 4 * found.epsilon
    for words in ("independent coin", "flipped by the server", "secret sampling", "network"):
        assert words in found.condition
    local = stated(LOCAL, {"d": {runs.STEP: 10}})
    assert "flipped by the client" in local.condition
    everyone = runs.clients(
        sampling=Sampling(scheme="everyone"), noise=Noise(multiplier=9.0, source="x", secure=True)
    )
    alone = stated(runs.facts("all", everyone), {"d": {Gaussian(9.0): 10}})
    assert alone.condition == ""
    assert alone.unsampled == alone.epsilon


def test_the_worst_client_counts_and_clients_do_not_add_up() -> None:
    found = stated(LOCAL, {f"c{n}": {runs.STEP: n} for n in (5, 60, 30)})
    assert found.worst == "c60"
    assert [row.releases for row in found.rows] == [60, 30, 5]
    assert found.epsilon == accounting.spent({runs.STEP: 60}, 1e-5, ADD).epsilon
    assert found.recompute.count('["accounts"][1]') == 1
    named = stated(LOCAL, {"shakespeare/ROMEO": {runs.STEP: 5}})
    assert named.worst == "ROMEO"


@pytest.mark.parametrize("spread", [15.0, 0.01], ids=["apart", "close"])
def test_among_many_clients_the_worst_is_found_without_asking_for_each(
    monkeypatch: pytest.MonkeyPatch, spread: float
) -> None:
    draw = np.random.default_rng(5)
    accounts: dict[str, dict[Event, int]] = {
        f"c{n}": {Gaussian(float(draw.uniform(5, 5 + spread))): 190 + int(draw.integers(0, 10))}
        for n in range(60)
    }
    everyone = runs.examples(
        sampling=Sampling(scheme="everyone"), noise=Noise(multiplier=5.0, source="x", secure=True)
    )
    given = runs.facts("many", everyone)
    asked = []
    real = accounting.spent

    def counted(groups: Any, delta: float, relation: Relation) -> accounting.Spent:
        asked.append(groups)
        return real(groups, delta, relation)

    monkeypatch.setattr(accounting, "spent", counted)
    found = stated(given, accounts)
    monkeypatch.undo()
    assert len(asked) <= 30
    each = {name: accounting.spent(g, 1e-5, ADD).epsilon for name, g in accounts.items()}
    assert found.epsilon == max(each.values())
    assert found.worst == max(each, key=lambda name: each[name])
    assert (len(found.rows), found.accounts) == (ROWS, 60)
    assert all(epsilon <= found.epsilon for epsilon in each.values())


def test_what_surely_costs_no_more() -> None:
    small, big = {PoissonGaussian(0.01, 2.0): 5}, {PoissonGaussian(0.01, 1.0): 5}
    assert within(small, big)
    assert not within(big, small)
    assert not within({PoissonGaussian(0.02, 2.0): 5}, {PoissonGaussian(0.01, 2.0): 5})
    assert not within({PoissonGaussian(0.01, 2.0): 6}, {PoissonGaussian(0.01, 2.0): 5})
    assert within({}, big)
    assert not within({Gaussian(1.0): 1, Gaussian(2.0): 1}, {Gaussian(0.1): 100})
    assert not within({TruncatedPoissonGaussian(0.1, 1.0, 9, 3): 1}, {Gaussian(0.1): 100})


def test_an_event_that_is_not_understood_has_no_bound() -> None:
    given = extract(CENTRAL, Unit.CLIENT, {"d": {runs.ROUND: 5}}).model_dump(by_alias=True)
    given["accounts"][0]["groups"][0]["event"]["kind"] = "shuffled-gaussian"
    (found,) = states(CENTRAL, Extract.model_validate(given))
    assert math.isinf(found.epsilon)
    assert (found.holds, found.guess, found.recompute) == (False, 1.0, "")
    assert "has no bound" in found.formal
    stored = found.model_dump(mode="json")
    assert stored["epsilon"] == "inf"
    assert Statement.model_validate_json(json.dumps(stored, allow_nan=False)) == found


def test_seeded_noise_holds_nothing() -> None:
    for changes in (
        {"noise": Noise(multiplier=2.0, source="insecure-seeded", secure=False)},
        {"sampling": Sampling(scheme="poisson", probability=0.1, secure=False)},
    ):
        given = runs.facts("seeded", runs.clients(**changes))
        assert not stated(given, {"d": {runs.ROUND: 5}}).holds


def test_v32_delta_of_one_over_the_units_is_refused() -> None:
    given = runs.facts("loose", runs.clients(delta=1 / 312))
    with pytest.raises(FedtuneError, match="delta") as caught:
        stated(given, {"d": {runs.ROUND: 5}})
    assert caught.value.code is ExitCode.PRIVACY


@pytest.mark.parametrize(
    ("ran", "event", "what"),
    [
        (runs.clients(), Gaussian(2.0), "sampler 'poisson'"),
        (runs.clients(), TruncatedPoissonGaussian(0.1, 2.0, 312, 40), "sampler 'poisson'"),
        (runs.clients(), PoissonGaussian(0.1, 1.0), "noise multiplier 3"),
        (
            runs.clients(noised_by="client", clip=Clip(rule="flat", norm=1.0)),
            runs.ROUND,
            "no statement",
        ),
    ],
)
def test_v15_v16_facts_that_contradict_the_ledger_are_refused(
    ran: Ran, event: Event, what: str
) -> None:
    with pytest.raises(FedtuneError, match=what) as caught:
        stated(runs.facts("odd", ran), {"d": {event: 5}})
    assert caught.value.code is ExitCode.PRIVACY


def test_a_charge_that_no_statement_speaks_of_is_refused() -> None:
    with pytest.raises(FedtuneError, match="do not speak of") as caught:
        states(CENTRAL, extract(CENTRAL, Unit.EXAMPLE, {"d": {runs.STEP: 5}}))
    assert caught.value.code is ExitCode.PRIVACY
    with pytest.raises(FedtuneError, match="no account") as caught:
        states(CENTRAL, extract(CENTRAL, Unit.CLIENT, {}))
    assert caught.value.code is ExitCode.LEDGER
    other = runs.facts("other", runs.clients())
    with pytest.raises(FedtuneError, match="other"):
        states(other, extract(CENTRAL, Unit.CLIENT, {"d": {runs.ROUND: 5}}))


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
def test_no_guess_is_better_than_said(mu: float) -> None:
    exact = NormalDist().cdf(mu / 2)  # of the best test of N(0, 1) against N(mu, 1)
    for delta in (1e-2, 1e-5):
        epsilon = accounting.spent({Gaussian(1 / mu): 1}, delta, ADD).epsilon
        assert exact <= guess(epsilon, delta) <= 1.0
    assert guess(0.0, 1e-9) == pytest.approx(0.5)


def test_taking_sampling_away_keeps_noise_and_counts() -> None:
    groups: dict[Event, int] = {
        PoissonGaussian(0.1, 2.0): 3, TruncatedPoissonGaussian(0.1, 2.0, 9, 3): 4,
        Gaussian(2.0): 5, Unbounded("x"): 1,
    }  # fmt: skip
    assert bare(groups) == {Gaussian(2.0): 12, Unbounded("x"): 1}


# ---------------------------------------------------------------- recomputed by others

CASES: dict[str, tuple[dict[Event, int], Relation, float]] = {
    "poisson": ({PoissonGaussian(0.02, 2.0): 1000}, ADD, 1e-5),
    "gaussian": ({Gaussian(4.0): 60, Gaussian(5.0): 40}, ADD, 1e-5),
    "mixed": ({PoissonGaussian(0.02, 2.0): 300, Gaussian(12.0): 20}, ADD, 1e-6),
    "everybody-drawn": ({PoissonGaussian(1.0, 5.0): 30}, SPECIAL, 1e-5),
    "truncated": ({TruncatedPoissonGaussian(0.1, 8.0, 60, 14): 20}, SPECIAL, 1e-4),
    "coarse": ({PoissonGaussian(0.8, 8.0): 3000}, ADD, 1e-5),
    "fine": ({PoissonGaussian(0.001, 4.0): 500}, ADD, 1e-5),
    "renyi": ({PoissonGaussian(0.5, 1.0): 150}, ADD, 1e-5),
    "laplace": ({Laplace(20.0): 60}, ADD, 1e-5),
    "sampled-laplace": ({PoissonLaplace(0.05, 1.5): 400, Gaussian(12.0): 20}, SPECIAL, 1e-5),
}

ALONE = """
import contextlib, io, json, os, sys
for case in json.load(sys.stdin):
    os.chdir(case["folder"])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(case["lines"], {})
    print(said.getvalue().strip())
assert not any(name.startswith("fedtune") for name in sys.modules)
"""


def recomputed(cases: list[dict[str, str]]) -> list[float]:
    """Run printed lines in an interpreter of their own, each in its folder."""
    result = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", ALONE],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    return [float(line) for line in result.stdout.split()]


def test_stock_dp_accounting_alone_gives_the_printed_epsilon(tmp_path: Path) -> None:
    cases, wanted = [], []
    for number, (name, (groups, relation, delta)) in enumerate(CASES.items()):
        folder = tmp_path / name
        folder.mkdir()
        # What stands before it must not matter.
        accounts = [{"groups": []}] * number + [{"groups": listed(groups)}]
        (folder / "report.json").write_text(
            json.dumps({"report": {"ledger": {"accounts": accounts}}})
        )
        spent = cost(groups, delta, relation)
        text = lines(number, groups, spent, relation)
        assert len(text.splitlines()) <= 4
        cases.append({"folder": str(folder), "lines": text})
        wanted.append(spent.epsilon)
    assert recomputed(cases) == pytest.approx(wanted, rel=5e-5)


def test_lines_speak_of_no_bound_where_there_is_none() -> None:
    spent = cost({Unbounded("x"): 1}, 1e-5, ADD)
    assert lines(0, {Unbounded("x"): 1}, spent, ADD) == ""
    assert lines(0, {}, spent, ADD) == ""


def test_events_are_read_back_as_they_were() -> None:
    groups: dict[Event, int] = {runs.STEP: 3, Gaussian(1.5): 2}
    account = extract(LOCAL, Unit.EXAMPLE, {"d": groups}).accounts[0]
    assert events_of(account.groups) == groups

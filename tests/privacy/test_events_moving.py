"""Levels and filters as events: stored, read, accounted, and put in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import FedtuneError
from fedtune.privacy.accounting import ORDERS, curve, group_epsilon, most, rdp, spent
from fedtune.privacy.costs import bare, cost
from fedtune.privacy.events import (
    MOST_LEVELS,
    Event,
    Gaussian,
    Levels,
    PoissonGaussian,
    Relation,
    RenyiFiltered,
    Unbounded,
    Unit,
    from_json,
    releases_in,
    to_dp_event,
    to_json,
)
from fedtune.privacy.facts import Noise, Sampling
from fedtune.privacy.ledger import Claim, open_ledger
from fedtune.privacy.ledger_records import canonical, event_id, event_json
from fedtune.privacy.policy import MIDDLE, bound, simplified
from fedtune.privacy.recompute import lines
from fedtune.privacy.report import build, card_lines
from fedtune.privacy.report_fields import event_words, ran_rows
from fedtune.privacy.report_ledger import Extract
from fedtune.privacy.report_render import as_html, as_markdown, sealed
from fedtune.privacy.signing import read_signer
from fedtune.privacy.statement import states
from tests.privacy import report_runs as runs
from tests.privacy.test_statement import listed, recomputed

ADD, SPECIAL = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_SPECIAL
LEVELS = Levels(0.05, (2.0, 2.2, 2.4), (5, 5, 5))
FILTERED = RenyiFiltered(8.3, 0.05)
PLAIN: dict[Event, int] = {PoissonGaussian(0.05, z): 5 for z in (2.0, 2.2, 2.4)}


# ---------------------------------------------------------------- stored


@pytest.mark.parametrize("event", [LEVELS, FILTERED, Levels(1.0, (3.0,), (1,))])
def test_events_survive_json(event: Event) -> None:
    stored = json.loads(json.dumps(to_json(event)))
    assert stored == to_json(event)
    assert from_json(stored) == event
    assert hash(from_json(stored)) == hash(event)
    assert event_id(event_json(event)) == event_id(json.loads(canonical(event_json(event))))


def test_whole_numbers_and_floats_are_the_same_event() -> None:
    one, two = Levels(1, (1, 2), (1, 1)), Levels(1.0, (1.0, 2.0), (1, 1))
    assert event_id(event_json(one)) == event_id(event_json(two))
    assert event_id(event_json(RenyiFiltered(8, 1))) == event_id(
        event_json(RenyiFiltered(8.0, 1.0))
    )


def test_what_ledgers_hold_is_written_as_before() -> None:
    """A changed text would be another event for every ledger that there is."""
    assert canonical(event_json(PoissonGaussian(0.01, 1))) == (
        '{"kind":"poisson-gaussian","noise_multiplier":1.0,"sampling_probability":0.01,"schema":1}'
    )
    assert event_id(event_json(Gaussian(2))).startswith("7f3bf3293c4bd7d06c4075870cf85e10")


WRONG: list[dict[str, Any]] = [
    {"noise_multipliers": []}, {"counts": []}, {"counts": [5, 5]}, {"counts": [5, 5, 0]},
    {"counts": [5, 5, 1.5]}, {"counts": [5, 5, True]}, {"counts": [5, 5, -1]}, {"counts": "555"},
    {"counts": [5, 5, 10**10]}, {"noise_multipliers": [2.2, 2.0, 2.4]},
    {"noise_multipliers": [2.0, 2.0, 2.4]}, {"noise_multipliers": [0.0, 2.0, 2.4]},
    {"noise_multipliers": [2.0, 2.2, float("nan")]}, {"noise_multipliers": "abc"},
    {"noise_multipliers": [2.0, 2.2, float("inf")]}, {"noise_multipliers": [[1.0], 2.0, 3.0]},
    {"noise_multipliers": {"a": 1}}, {"noise_multipliers": None}, {"sampling_probability": 0.0},
    {"sampling_probability": 1.5}, {"sampling_probability": [0.1]}, {"more": 1},
    {"noise_multipliers": [float(n) for n in range(1, MOST_LEVELS + 2)],
     "counts": [1] * (MOST_LEVELS + 1)},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_levels_that_cannot_be_are_unbounded(wrong: dict[str, Any]) -> None:
    read = from_json(to_json(LEVELS) | wrong)
    assert isinstance(read, Unbounded)
    if "more" not in wrong:
        values = {"noise_multipliers": LEVELS.noise_multipliers, "counts": LEVELS.counts,
                  "sampling_probability": 0.05} | wrong  # fmt: skip
        with pytest.raises(FedtuneError, match="cannot be accounted"):
            to_json(Levels(**values))


@pytest.mark.parametrize("order", [1.0, 1.01, 0.5, -8.0, float("nan"), True, "8"])
def test_orders_that_are_none_are_unbounded(order: Any) -> None:
    assert isinstance(from_json(to_json(FILTERED) | {"order": order}), Unbounded)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([LEVELS, FILTERED]),
    name=st.sampled_from(["noise_multipliers", "counts", "order", "divergence", "kind", "schema"]),
    value=JUNK,
)
def test_whatever_is_stored_is_read_or_unbounded(kind: Event, name: str, value: Any) -> None:
    read = from_json(to_json(kind) | {name: value})
    hash(read)
    if not isinstance(read, Unbounded):
        assert from_json(to_json(read)) == read


# ---------------------------------------------------------------- accounted


@pytest.mark.parametrize("relation", [ADD, SPECIAL])
def test_levels_cost_what_stock_dp_accounting_says(relation: Relation) -> None:
    near = dp.NeighboringRelation[relation.name]
    found = bound({LEVELS: 4}, 1e-5, relation, MIDDLE)
    assert found.grid == MIDDLE
    tight = dp.pld.PLDAccountant(near, MIDDLE).compose(to_dp_event(LEVELS), 4)
    assert found.pld == pytest.approx(tight.get_epsilon(1e-5), rel=1e-6)
    loose = dp.rdp.RdpAccountant(ORDERS, near).compose(to_dp_event(LEVELS), 4)
    assert found.rdp == pytest.approx(loose.get_epsilon(1e-5), rel=1e-9)
    by_hand = dp.rdp.RdpAccountant(ORDERS, near)
    for event, count in PLAIN.items():
        by_hand.compose(to_dp_event(event), 4 * count)
    assert found.rdp == pytest.approx(by_hand.get_epsilon(1e-5), rel=1e-9)


def test_levels_are_their_releases() -> None:
    assert simplified({LEVELS: 4}, ADD) == {event: 4 * n for event, n in PLAIN.items()}
    assert simplified({Levels(1.0, (2.0, 4.0), (1, 4)): 2}, ADD) == {Gaussian(1.0): 1}
    np.testing.assert_array_equal(
        rdp(LEVELS, ADD), sum((n * rdp(event, ADD) for event, n in PLAIN.items()), np.zeros(1))
    )
    one, two = spent({LEVELS: 4}, 1e-5, ADD), spent({e: 4 * n for e, n in PLAIN.items()}, 1e-5, ADD)
    assert one == two
    assert one.releases == 60 == 4 * releases_in(LEVELS)


def test_rounds_of_levels_are_counted_in_rounds() -> None:
    epsilon = spent({LEVELS: 7}, 1e-5, ADD).epsilon
    assert most(LEVELS, epsilon * (1 + 1e-9), 1e-5, ADD, {LEVELS: 3}) == 4
    assert [n for n, _ in curve({LEVELS: 4}, 1e-5, ADD, 2)] == [2, 4]
    assert group_epsilon({LEVELS: 4}, 1e-5, ADD, 2) == pytest.approx(
        group_epsilon({e: 4 * n for e, n in PLAIN.items()}, 1e-5, ADD, 2)
    )


def test_a_filter_is_its_order_and_nothing_above_it() -> None:
    vector, at = rdp(FILTERED, ADD), ORDERS.index(8.3)
    # Below, too: a Renyi divergence never falls with the order.
    assert set(vector[: at + 1]) == {0.05}
    assert set(vector[at + 1 :]) == {np.inf}
    found = spent({FILTERED: 10}, 1e-5, ADD)
    assert (found.accountant, found.order, found.epsilon_pld, found.mu) == ("rdp", 8.3, None, None)
    stock, order = dp.rdp.compute_epsilon([8.3], [0.5], 1e-5)
    assert (found.epsilon, found.order) == (pytest.approx(stock), order)
    assert isinstance(to_dp_event(FILTERED), dp.NonPrivateDpEvent)


def test_what_a_filter_says_holds_for_what_it_admits() -> None:
    """At every order: the vector of an event with this divergence at its order."""
    event = PoissonGaussian(0.02, 1.5)
    exact = rdp(event, ADD)
    filtered = rdp(RenyiFiltered(8.3, float(exact[ORDERS.index(8.3)])), ADD)
    assert (filtered >= exact * (1 - 1e-12)).all()


def test_filters_of_two_orders_are_bounded_by_the_lower() -> None:
    other = RenyiFiltered(4.0, 0.1)
    found = spent({FILTERED: 10, other: 5}, 1e-5, ADD)
    assert found.order == 4.0
    assert found.epsilon == pytest.approx(dp.rdp.compute_epsilon([4.0], [1.0], 1e-5)[0])


def test_a_filter_beside_plain_releases_keeps_to_renyi() -> None:
    plain = PoissonGaussian(0.02, 2.0)
    found = spent({FILTERED: 4, plain: 100}, 1e-5, ADD)
    total = 4 * 0.05 + 100 * rdp(plain, ADD)[ORDERS.index(found.order)]
    assert found.epsilon == pytest.approx(dp.rdp.compute_epsilon([found.order], [total], 1e-5)[0])
    assert found.epsilon_pld is None


@pytest.mark.parametrize("order", [8.31, 65.0, 2000.0])
def test_an_unknown_order_is_an_error(order: float) -> None:
    for ask in (lambda event: rdp(event, ADD), lambda event: spent({event: 1}, 1e-5, ADD)):
        with pytest.raises(FedtuneError, match=r"accounting\.ORDERS"):
            ask(RenyiFiltered(order, 0.1))


def test_without_credit_for_sampling() -> None:
    assert bare({LEVELS: 4}) == {Levels(1.0, LEVELS.noise_multipliers, LEVELS.counts): 4}
    without = cost(bare({LEVELS: 4}), 1e-5, ADD)
    assert without.accountant == "analytic"
    assert without.epsilon > cost({LEVELS: 4}, 1e-5, ADD).epsilon
    assert cost(bare({FILTERED: 1}), 1e-5, ADD).epsilon == np.inf


# ---------------------------------------------------------------- said, and said again by others


def test_stock_dp_accounting_alone_gives_the_printed_epsilon(tmp_path: Path) -> None:
    unsampled = Levels(1.0, (4.0, 5.0), (6, 6))
    asked: dict[str, dict[Event, int]] = {
        "levels": {LEVELS: 4}, "filtered": {FILTERED: 10},
        "levels-beside": {LEVELS: 2, PoissonGaussian(0.05, 2.2): 15},
        "levels-analytic": {unsampled: 2}, "both-analytic": {unsampled: 2, Gaussian(9.0): 3},
        "two-orders": {FILTERED: 10, RenyiFiltered(4.0, 0.1): 5},
        "filtered-beside": {FILTERED: 4, PoissonGaussian(0.02, 2.0): 100, LEVELS: 1},
    }  # fmt: skip
    cases, wanted = [], []
    for name, groups in asked.items():
        (tmp_path / name).mkdir()
        accounts = [{"groups": []}, {"groups": listed(groups)}]
        (tmp_path / name / "report.json").write_text(
            json.dumps({"report": {"ledger": {"accounts": accounts}}})
        )
        found = cost(groups, 1e-5, ADD)
        cases.append({"folder": str(tmp_path / name), "lines": lines(1, groups, found, ADD)})
        wanted.append(found.epsilon)
    assert recomputed(cases) == pytest.approx(wanted, rel=5e-5)


def test_words() -> None:
    assert event_words(LEVELS, 4) == (
        "4 times Poisson 0.05 in an order chosen on the way (5 with noise 2, 5 with noise 2.2 "
        "and 5 with noise 2.4)"
    )
    assert event_words(FILTERED, 10) == "10 times a filter of Renyi order 8.3 with budget 0.05"


@pytest.mark.parametrize(("event", "least"), [(LEVELS, 2.0), (FILTERED, 1.8)])
def test_a_report_says_what_moved(event: Event, least: float, tmp_path: Path) -> None:
    sampling = Sampling(scheme="poisson", probability=0.05, population=400, flipped_by="client",
                        source="os-entropy-aes256-ctr")  # fmt: skip
    noise = Noise(multiplier=least, source="os-entropy-aes256-ctr", secure=True, grid=2.4e-6,
                  margin=0.0012)  # fmt: skip
    told = runs.facts("moving", runs.examples(sampling=sampling, noise=noise))
    ledger = open_ledger(tmp_path / "ledger.db", actor="test")
    runs.spend(ledger, told.job, Unit.EXAMPLE, {"shakespeare/ROMEO": (event, 4, 1)},
               budget=(8.0, 1e-5))  # fmt: skip
    account = ledger.account("shakespeare/ROMEO", Unit.EXAMPLE, ADD)
    ledger.reserve(account, Claim(told.job, 5, 0, event))  # its round was lost
    extract = Extract.model_validate(ledger.extract(told.job))
    (found,) = states(told, extract)
    assert found.releases == 5 * releases_in(event)
    assert found.epsilon == spent({event: 5}, 1e-5, ADD).epsilon
    assert extract.accounts[0].unfinished == releases_in(event)
    compact = Extract.model_validate(ledger.extract(told.job, compact=True))
    assert compact.accounts[0].unfinished == releases_in(event)
    rows = dict(ran_rows(told.mechanisms[0], found, {event: 5}))
    assert rows["Noise"].startswith(f"Gaussian, at least {least:g} times the sensitivity")
    assert rows["Charged in the ledger"] == event_words(event, 5)
    assert "Poisson" in rows["Sampler that ran"]
    report = build(told, extract)
    (chapter,) = report.chapters
    assert chapter.curve[-1].epsilon == pytest.approx(found.epsilon)
    assert chapter.budgets[0].more is not None
    more = chapter.budgets[0].more / releases_in(event)
    assert spent({event: 5 + round(more)}, 1e-5, ADD).epsilon <= 8.0
    if isinstance(event, RenyiFiltered):
        assert found.unsampled == np.inf
        assert (found.accountant, found.order) == ("rdp", 8.3)
    else:
        assert found.unsampled == chapter.curve[-1].unsampled > found.epsilon
    # Facts that speak of more noise than was charged are not believed.
    if isinstance(event, Levels):
        louder = noise.model_copy(update={"multiplier": 2.2})
        with pytest.raises(FedtuneError, match="the ledger 2"):
            states(runs.facts("moving", runs.examples(sampling=sampling, noise=louder)), extract)


def test_a_filter_states_nothing_without_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("FEDTUNE_SIGNING_KEY", raising=False)
    signer = read_signer(None, lambda _: None)
    told = runs.facts("moving", runs.examples())
    ledger = open_ledger(tmp_path / "ledger.db", actor="test")
    runs.spend(ledger, told.job, Unit.EXAMPLE, {"shakespeare/ROMEO": (FILTERED, 4, 1)})
    report = build(told, Extract.model_validate(ledger.extract(told.job)))
    sealed_up = sealed(report, signer)
    page, paper = as_html(sealed_up, signer).decode(), as_markdown(sealed_up).decode()
    for text in (page, paper, "\n".join(card_lines(report))):
        assert "nothing is stated: the filter that chose the noise counted on sampling" in text
        assert "ε = no bound" not in text
    for text in (page, paper):
        assert "a filter of Renyi order 8.3 with budget 0.05" in text
        assert "compute_epsilon([8.3]" in text
    assert "Without secret sampling: no bound." in page

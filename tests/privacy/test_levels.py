"""Noise that moves over time: what a round is charged, and that nothing spends more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.accounting import ORDERS, rdp, spent
from fedtune.privacy.distributions import composed_pld
from fedtune.privacy.events import (
    Charge,
    Event,
    Gaussian,
    Levels,
    PoissonGaussian,
    Relation,
    RenyiFiltered,
    Unit,
)
from fedtune.privacy.filters import best_order
from fedtune.privacy.ledger import Account, Claim, Ledger
from fedtune.privacy.plan import Promise, promises, resolve, rounds_that_fit
from fedtune.privacy.rldp.course import Course, cost_in_filter, levels_of
from fedtune.privacy.rldp.levels import Constant, Filtered, NoiseBook, Ordered, noise_book
from fedtune.privacy.sampling import Everyone, Poisson, TruncatedPoisson
from tests.privacy.ledgers import refused

ADD, SPECIAL = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_SPECIAL
LARGE = 60.0
"""A target beyond which distributions are not asked: noise for it is found at once."""
STRANGE = [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-300, 1e300, 0.97, 1.0312]
wishes = st.lists(st.one_of(st.none(), st.sampled_from(STRANGE), st.floats(0.5, 2.0)), max_size=60)


def settings_of(noise: str, **changes: Any) -> Config:
    """Five rounds of nine steps each."""
    many = changes.get("sampler") == "everyone"
    rldp = {"noise": noise, "mode": "online", "spread": changes.pop("spread", 0.1)}
    steps, rounds = changes.pop("steps", 9), changes.pop("rounds", 5)
    told = {
        "relation": ADD.value, "population": 200, "delta": 1e-4, "epsilon": 4.0,
        "clip": "rldp", "rldp": rldp,
    }  # fmt: skip
    together = 10 if many else 1
    return Config.model_validate({
        "data": {"pack": False, "holdout": 0.0}, "evaluation": {"clients": 0},
        "federation": {
            "weighting": "uniform", "rounds": rounds, "cohort": 1.0 if many else 0.1,
        },
        "tuning": {"batch_size": 20, "accumulate": together, "steps": steps},
        "privacy": {"example": told | changes},
    })  # fmt: skip


def promise(noise: str, **changes: Any) -> Promise:
    (found,) = promises(settings_of(noise, **changes))
    return found


@pytest.fixture(scope="module")
def ordered() -> Promise:
    return promise("order", noise_multiplier=1.5)


@pytest.fixture(scope="module")
def filtered() -> Promise:
    return promise("filtered")


# ---------------------------------------------------------------- levels


@pytest.mark.parametrize(
    ("noises", "counts", "precision"),
    [
        ((0.893, 0.993, 1.141), (333, 333, 334), 0.95),
        ((0.859, 1.073, 1.395), (333, 333, 334), 0.86),
        ((0.814, 1.221), (200, 800), 0.79),
    ],
)
def test_what_variety_costs(
    noises: tuple[float, ...], counts: tuple[int, ...], precision: float
) -> None:
    """Epsilon 2 at delta 1e-5, as 1000 steps of 512 of 50,000 with constant noise 0.971."""
    found = spent([Charge(Levels(512 / 50_000, noises, counts))], 1e-5, ADD)
    assert found.epsilon == pytest.approx(2.0, abs=0.006)
    assert (found.accountant, found.releases) == ("pld", 1000)
    mean = sum(n / z**2 for z, n in zip(noises, counts, strict=True)) / 1000
    assert mean * 0.971**2 == pytest.approx(precision, abs=0.01)


def pair(z: float) -> tuple[list[float], list[float]]:
    """Two distributions on three outcomes, further apart with less noise."""
    shift = math.exp(-z)
    return [0.5 + shift / 3, 0.3, 0.2 - shift / 3], [0.5 - shift / 2, 0.3, 0.2 + shift / 2]


def tree(book: Ordered, choose: dict[tuple[int, ...], float], ends: frozenset[tuple[int, ...]],
         history: tuple[int, ...] = (), p: float = 1.0, q: float = 1.0,
         ) -> list[tuple[float, float]]:  # fmt: skip
    """Return (p, q) of each course of events when ``choose`` says what is wanted after each."""
    z = None if history in ends else book.take(choose.get(history, math.nan))
    if z is None:
        return [(p, q)]
    state, found = book.state(), []
    for outcome, (one, two) in enumerate(zip(*pair(z), strict=True)):
        again = Ordered(book.levels, book.planned)
        again.restore(state)
        found += tree(again, choose, ends, (*history, outcome), p * one, q * two)
    return found


def hockey_stick(laws: Sequence[tuple[float, float]], slope: float) -> float:
    return math.fsum(max(p - slope * q, 0.0) for p, q in laws)


histories = st.lists(st.integers(0, 2), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    choose=st.dictionaries(histories, st.sampled_from([0.5, 1.0, 1.5, 2.0]), max_size=30),
    ends=st.frozensets(histories.filter(len), max_size=3),
    slope=st.floats(0.2, 20.0),
)
def test_any_order_costs_the_same_and_stopping_no_more(
    choose: dict[tuple[int, ...], float], ends: frozenset[tuple[int, ...]], slope: float
) -> None:
    """The proof of ``levels.py``, by enumeration, both ways round."""
    levels = Levels(1.0, (0.5, 1.0, 2.0), (1, 2, 1))
    each = [pair(z) for z in (0.5, 1.0, 1.0, 2.0)]
    fixed = [
        (math.prod(e[0][i] for e, i in zip(each, at, strict=True)),
         math.prod(e[1][i] for e, i in zip(each, at, strict=True)))
        for at in itertools.product(range(3), repeat=4)
    ]  # fmt: skip
    whole = tree(Ordered(levels, 1.0), choose, frozenset())
    stopped = tree(Ordered(levels, 1.0), choose, ends)
    for turn in (1, -1):
        limit = hockey_stick([one[::turn] for one in fixed], slope)
        assert hockey_stick([one[::turn] for one in whole], slope) == pytest.approx(limit)
        assert hockey_stick([one[::turn] for one in stopped], slope) <= limit + 1e-12


@settings(max_examples=100, deadline=None, derandomize=True)
@given(wanted=wishes)
def test_any_order_is_admitted_and_never_more_than_the_set(
    ordered: Promise, wanted: list[float | None]
) -> None:
    book, event = noise_book(ordered), ordered.charge.event
    assert isinstance(event, Levels)
    taken = [z for z in map(book.take, wanted) if z is not None]
    assert len(taken) == min(len(wanted), ordered.releases)
    for z, count in zip(event.noise_multipliers, event.counts, strict=True):
        assert taken.count(z) <= count
    assert set(taken) <= set(event.noise_multipliers)
    for z in taken:
        assert ordered.at(z).noise_multiplier == z


def test_the_nearest_level_is_taken_while_it_is_there() -> None:
    book = Ordered(levels_of(0.1, 1.0, 9, 0.2), 1.0)
    assert [book.take(0.9) for _ in range(8)] == [1.0, 1.0, 1.0, 0.8, 0.8, 0.8, 1.2, 1.2]
    assert book.offers() == (1.2,)
    assert (book.take(math.nan), book.take(None), book.offers()) == (1.2, None, ())


# ---------------------------------------------------------------- the filter


@pytest.mark.parametrize("relation", [ADD, SPECIAL])
@pytest.mark.parametrize("order", [1.5, 2.0, 8.3, 63.0, 128.0])
@pytest.mark.parametrize(("q", "z"), [(0.001, 0.6), (0.032, 1.2), (0.5, 3.0)])
def test_one_order_alone_costs_what_it_costs_among_all(
    q: float, z: float, order: float, relation: Relation
) -> None:
    whole = float(rdp(PoissonGaussian(q, z), relation)[ORDERS.index(order)])
    assert cost_in_filter(q, z, order, relation) == whole


def greedy(book: Filtered, wanted: float | None) -> float | None:
    """Ask for what looks cheapest: the least noise that is still offered."""
    offered = book.offers()
    return offered[0] if offered and wanted is None else wanted


@settings(max_examples=40, deadline=None, derandomize=True)
@given(wanted=wishes, crashes=st.sets(st.integers(0, 60)))
def test_the_filter_never_overspends(
    filtered: Promise, wanted: list[float | None], crashes: set[int]
) -> None:
    """Whoever chooses, and however often the process dies after it has booked."""
    event, book = filtered.charge.event, noise_book(filtered)
    assert isinstance(event, RenyiFiltered)
    at, taken = ORDERS.index(event.order), []
    for step, wish in enumerate([*wanted, *([None] * filtered.releases)]):
        assert isinstance(book, Filtered)
        z = book.take(greedy(book, wish))
        if z is None:
            break
        taken.append(z)
        assert filtered.least_noise <= z <= filtered.moving.high
        if step in crashes:
            again = noise_book(filtered)
            again.restore(book.state())
            book = again
    vectors = [rdp(filtered.at(z).event, ADD)[at] for z in taken]
    assert math.fsum(vectors) <= event.divergence
    assert len(taken) <= filtered.releases


def test_with_the_planned_noise_no_step_is_refused(filtered: Promise) -> None:
    book, z = noise_book(filtered), filtered.mechanism.noise_multiplier
    assert [book.take(z) for _ in range(filtered.releases + 1)] == [z] * 9 + [None]
    loud = noise_book(filtered)
    taken = [loud.take(0.0) for _ in range(9)]
    assert taken[0] == filtered.least_noise
    assert taken[-1] is None
    assert taken.index(None) >= 5


def test_without_sampling_the_sum_of_squares_is_the_filter() -> None:
    made = promise("filtered", sampler="everyone")
    z, book = made.mechanism.noise_multiplier, noise_book(made)
    assert made.charge == Charge(Gaussian(z), 9)
    assert [book.take(z) for _ in range(10)] == [z] * 9 + [None]
    book, taken = noise_book(made), []
    while (found := book.take(made.least_noise)) is not None:
        taken.append(found)
    assert math.fsum(1 / one**2 for one in taken) <= 9 / z**2
    assert 7 <= len(taken) < 9


def test_a_book_goes_on_from_its_own_state_only(ordered: Promise, filtered: Promise) -> None:
    for made in (ordered, filtered, promise("constant", noise_multiplier=1.0)):
        book: NoiseBook = noise_book(made)
        before = book.state()
        book.take(None)
        after = book.state()
        other = noise_book(made)
        other.restore(after)
        assert [other.take(None) for _ in range(9)] == [book.take(None) for _ in range(9)]
        with refused(ExitCode.PRIVACY):  # older: it would give back what was released
            book.restore(before)
        fresh = noise_book(made)
        for name, value in after.items():
            for wrong in (value + 100, value.astype(np.float32), value[:0], value * np.nan):
                with refused(ExitCode.PRIVACY):
                    fresh.restore(after | {name: wrong})
            with refused(ExitCode.PRIVACY):
                fresh.restore({key: one for key, one in after.items() if key != name})
        with refused(ExitCode.PRIVACY):
            fresh.restore(after | {"more": np.zeros(1)})
        assert fresh.state().keys() == before.keys()
        assert all(np.array_equal(fresh.state()[name], before[name]) for name in before)
    with refused(ExitCode.PRIVACY):
        noise_book(ordered).restore(noise_book(filtered).state())
    narrow = noise_book(promise("order", noise_multiplier=1.5, spread=0.05))
    with refused(ExitCode.PRIVACY):
        noise_book(ordered).restore(narrow.state())


def test_noise_that_was_not_offered_is_refused(ordered: Promise, filtered: Promise) -> None:
    for made in (ordered, filtered, promise("constant", noise_multiplier=1.0)):
        for wrong in (made.least_noise / 1.01, made.moving.high * 1.01, math.nan, math.inf):
            with refused(ExitCode.PRIVACY):
                made.at(wrong)
    with refused(ExitCode.PRIVACY):
        ordered.at(1.5001)
    assert filtered.at(filtered.least_noise).noise_multiplier == filtered.least_noise


# ---------------------------------------------------------------- promises


@pytest.mark.parametrize(
    ("noise", "sampler"), itertools.product(["order", "filtered"], ["poisson", "everyone"])
)
def test_the_whole_plan_keeps_its_target(noise: str, sampler: str) -> None:
    made = promise(noise, sampler=sampler, epsilon=LARGE)
    plain = promise("constant", sampler=sampler, epsilon=LARGE)
    assert 0.97 * LARGE < made.spent().epsilon <= LARGE
    assert rounds_that_fit(made, LARGE) == 5
    assert made.spent(4).epsilon < made.spent().epsilon
    without = made.plain_spent().epsilon
    assert (without > made.spent().epsilon) == (sampler == "poisson")
    more = made.mechanism.noise_multiplier / plain.mechanism.noise_multiplier
    if (sampler, noise) == ("everyone", "filtered"):
        assert more == 1.0  # free and exact
    else:
        assert 1.0 <= more < 1.25
    assert made.charge.count == (9 if (sampler, noise) == ("everyone", "filtered") else 1)


def test_the_order_is_the_best_one_for_the_least_noise(filtered: Promise) -> None:
    event = filtered.charge.event
    assert isinstance(event, RenyiFiltered)
    assert event.order == best_order(4.0, 1e-4, ADD, filtered.at(filtered.least_noise).event)
    # Written into the settings, the noise makes the same promise again.
    again = promise("filtered", noise_multiplier=filtered.mechanism.noise_multiplier)
    assert again.charge == filtered.charge
    alone = promise("filtered", noise_multiplier=2.0, epsilon=0.0)
    assert alone.limit is None
    assert isinstance(alone.charge.event, RenyiFiltered)
    assert alone.spent().epsilon < 4.0


def test_what_cannot_move_says_so() -> None:
    short = Course("order", 0.1, Unit.EXAMPLE, Poisson(0.1), ADD, False, 2, 10, 2.0, 1e-3)
    with pytest.raises(FedtuneError, match="2 releases in a round"):
        short.at(1.0)
    whole = Course("order", 0.1, Unit.CLIENT, Poisson(0.1), ADD, False, 1, 10, 2.0, 1e-3)
    with pytest.raises(FedtuneError, match="nothing to order"):
        whole.at(1.0)
    course = Course("filtered", 0.1, Unit.CLIENT, TruncatedPoisson(0.1, 100, 20), SPECIAL, False,
                    1, 10, 2.0, 1e-3)  # fmt: skip
    with pytest.raises(FedtuneError, match="TruncatedPoisson"):
        course.at(1.0)
    laplace = Course("order", 0.1, Unit.EXAMPLE, Poisson(0.1), ADD, True, 9, 10, 2.0, 1e-3)
    with pytest.raises(FedtuneError, match="Laplace"):
        laplace.at(1.0)
    still = Course("filtered", 1e-9, Unit.EXAMPLE, Everyone(), ADD, False, 9, 10, 2.0, 1e-3)
    with pytest.raises(FedtuneError, match="spread"):
        still.at(1.0)


# ---------------------------------------------------------------- the ledger


def admitted(ledger: Ledger, account: Account, charge: Charge, number: int, made: Promise) -> bool:
    """Reserve and release a round; or see that nothing is charged when it is refused."""
    before = ledger.groups(account)
    claim = Claim("job", number, 0, charge.event, charge.count, limit=made.limit)
    try:
        ledger.release(ledger.reserve(account, claim))
    except FedtuneError as error:
        return error.code != ExitCode.BUDGET_EXHAUSTED or ledger.groups(account) != before
    return True


def test_chosen_noise_never_meets_a_privacy_loss_distribution(
    filtered: Promise, small: Ledger
) -> None:
    """Composing what was chosen is no bound (arXiv:2602.06756), and it looks cheaper."""
    book, taken = noise_book(filtered), []
    while (z := book.take(filtered.least_noise)) is not None:
        taken.append(z)
    tempting: dict[Event, int] = {}
    for z in taken:
        event = filtered.at(z).event
        tempting[event] = tempting.get(event, 0) + 1
    account = small.account("notes", Unit.EXAMPLE, ADD)
    charge = filtered.charge
    small.release(small.reserve(account, Claim("job", 1, 0, charge.event, charge.count)))
    found = small.spent(account, 1e-4)
    assert (found.accountant, found.epsilon_pld, found.mu) == ("rdp", None, None)
    assert spent(tempting, 1e-4, ADD).epsilon < found.epsilon
    with pytest.raises(FedtuneError, match="no privacy loss distribution"):
        composed_pld({charge.event: 1}, 1e-2, ADD)


@pytest.mark.parametrize("noise", ["order", "filtered"])
def test_a_round_more_than_planned_is_refused(noise: str, small: Ledger) -> None:
    made = promise(noise, epsilon=LARGE)
    account = small.account("notes", Unit.EXAMPLE, ADD)
    charge = made.charge
    for number in range(1, 6):
        claim = Claim("job", number, 0, charge.event, charge.count, limit=made.limit)
        small.release(small.reserve(account, claim))
    with refused(ExitCode.BUDGET_EXHAUSTED):
        small.reserve(account, Claim("job", 6, 0, charge.event, charge.count, limit=made.limit))
    assert small.groups(account) == {charge.event: 5}
    assert small.spent(account, made.delta) == made.spent()
    small.verify()


def test_resolve_writes_noise_that_keeps_the_target() -> None:
    config = settings_of("order", epsilon=LARGE)
    written = resolve(config)
    assert written.privacy.example is not None
    (made,) = promises(written)
    assert made.mechanism.noise_multiplier == written.privacy.example.noise_multiplier
    small = made.settings.model_copy(update={"noise_multiplier": 0.3})
    lax = written.model_copy(
        update={"privacy": written.privacy.model_copy(update={"example": small})}
    )
    with refused(ExitCode.PRIVACY):
        resolve(lax)


def test_constant_noise_is_what_it_was() -> None:
    book = Constant(1.0, 2)
    assert (book.take(math.nan), book.offers(), book.take(7.0)) == (1.0, (1.0,), 1.0)
    assert (book.take(1.0), book.offers()) == (None, ())
    made = promise("constant", noise_multiplier=1.1)
    assert made.charge == Charge(PoissonGaussian(0.1, 1.1), 9)
    assert made.least_noise == 1.1

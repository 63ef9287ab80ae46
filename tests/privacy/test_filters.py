import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import policy
from fedtune.privacy.accounting import ORDERS, epsilon_of_rdp, rdp
from fedtune.privacy.bounds import gaussian_epsilon
from fedtune.privacy.events import (
    Event,
    Gaussian,
    PoissonGaussian,
    Relation,
    TruncatedPoissonGaussian,
    Unbounded,
)
from fedtune.privacy.filters import GdpFilter, RenyiFilter, best_order, mu_of

ADD = Relation.ADD_OR_REMOVE_ONE
DELTA = 1e-6


def test_golden_adaptive_noise() -> None:
    """Epsilon 4, delta 1e-6, rate 0.02, noise spread evenly over 0.9 to 1.6: about 1094.

    How the schedule of the golden value was drawn is not known; multiples of the
    golden ratio, which spread evenly in any stretch, come within two percent of it.
    """
    budget = RenyiFilter(5.7, 4.0, DELTA, ADD)
    total = np.zeros(len(ORDERS))
    for step in itertools.count():
        z = 0.9 + 0.7 * (math.floor(40 * (step * 0.6180339887 % 1)) + 0.5) / 40
        event = PoissonGaussian(0.02, z)
        if not budget.admit(event):
            break
        total += rdp(event, ADD)
    assert budget.admitted == pytest.approx(1094, rel=0.02)
    epsilon, order = epsilon_of_rdp(total, DELTA)
    assert 3.98 < epsilon <= 4.0
    assert order == pytest.approx(5.7, abs=0.3)


def test_freedom_costs_about_an_eighth_over_a_schedule_fixed_in_advance() -> None:
    cycle = [PoissonGaussian(0.02, z) for z in (0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6)]
    budget = RenyiFilter(5.7, 4.0, DELTA, ADD)
    done: dict[Event, int] = {}
    for event in itertools.cycle(cycle):
        if not budget.admit(event):
            break
        done[event] = done.get(event, 0) + 1
    assert 3.45 < policy.price(done, DELTA, ADD, policy.MIDDLE) < 3.6


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    order=st.sampled_from([2.0, 5.7, 16.0]),
    epsilon=st.floats(0.5, 8.0),
    wanted=st.lists(st.sampled_from([0.7, 0.9, 1.3, 2.0, 5.0]), min_size=1, max_size=300),
)
def test_renyi_filter_never_overspends(order: float, epsilon: float, wanted: list[float]) -> None:
    """Whoever chooses: each refusal is answered by more noise, each success by less."""
    try:
        budget = RenyiFilter(order, epsilon, DELTA, ADD)
    except FedtuneError:
        return  # nothing fits at this order
    total = np.zeros(len(ORDERS))
    greedy = 0.7
    for z in wanted:
        event = PoissonGaussian(0.05, min(z, greedy))
        if budget.admit(event):
            total += rdp(event, ADD)
            greedy = max(0.7, greedy * 0.8)
        else:
            greedy = min(40.0, greedy * 2)
    at = ORDERS.index(budget.order)
    assert total[at] <= budget.spent <= budget.budget
    alone = np.full(len(ORDERS), np.inf)
    alone[at] = budget.spent
    assert epsilon_of_rdp(alone, DELTA)[0] <= epsilon * (1 + 1e-12)


def test_filter_fills_up_and_says_no_before_it_takes_anything() -> None:
    budget = RenyiFilter(8.0, 2.0, 1e-5, ADD)
    event = Gaussian(4.0)
    count = math.floor(budget.budget / budget.cost(event))
    assert [budget.admit(event) for _ in range(count + 3)] == [True] * count + [False] * 3
    assert budget.admitted == count
    before = budget.state_dict()
    assert not budget.fits(event)
    assert budget.state_dict() == before
    assert budget.fits(Gaussian(40.0))


def test_budget_is_the_conversion_backwards() -> None:
    for order in (1.5, 5.7, 64.0 - 1, 512.0):
        budget = RenyiFilter(order, 3.0, 1e-4, ADD) if order > 4 else None
        if budget is None:
            with pytest.raises(FedtuneError, match="nothing fits"):
                RenyiFilter(order, 3.0, 1e-4, ADD)
            continue
        vector = np.full(len(ORDERS), np.inf)
        vector[ORDERS.index(order)] = budget.budget
        assert epsilon_of_rdp(vector, 1e-4)[0] == pytest.approx(3.0, rel=1e-9)


@pytest.mark.parametrize(
    "event",
    [Unbounded("lost"), TruncatedPoissonGaussian(0.1, 2.0, 300, 60)],
)
def test_unknown_costs_do_not_fit(event: Event) -> None:
    budget = RenyiFilter(8.0, 2.0, 1e-5, Relation.REPLACE_SPECIAL)
    assert not budget.admit(event)
    assert (budget.spent, budget.admitted) == (0.0, 0)


@pytest.mark.parametrize("z", [0.0, -1.0, math.nan, math.inf])
def test_noise_that_is_no_number_is_refused(z: float) -> None:
    for budget in (RenyiFilter(8.0, 2.0, 1e-5, ADD), GdpFilter(1.0)):
        with pytest.raises(FedtuneError) as caught:
            budget.admit(Gaussian(z))
        assert caught.value.code is ExitCode.PRIVACY
        assert budget.spent == 0


@pytest.mark.parametrize(
    ("order", "epsilon", "delta", "spent"),
    [
        (8.0, math.nan, 1e-5, 0.0),
        (8.0, 0.0, 1e-5, 0.0),
        (8.0, 2.0, math.nan, 0.0),
        (8.0, 2.0, 1.0, 0.0),
        (math.nan, 2.0, 1e-5, 0.0),
        (5.75, 2.0, 1e-5, 0.0),
        (1.1, 2.0, 1e-5, 0.0),
        (8.0, 2.0, 1e-5, -1.0),
        (8.0, 2.0, 1e-5, math.nan),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(
    order: float, epsilon: float, delta: float, spent: float
) -> None:
    with pytest.raises(FedtuneError) as caught:
        RenyiFilter(order, epsilon, delta, ADD, spent)
    assert caught.value.code is ExitCode.PRIVACY


def test_state_survives_a_restart() -> None:
    budget = RenyiFilter(8.0, 2.0, 1e-5, ADD)
    budget.admit(PoissonGaussian(0.01, 1.0))
    again = RenyiFilter.from_state(budget.state_dict())
    assert again == budget
    assert again.spent > 0
    gaussian = GdpFilter(2.0)
    gaussian.admit(Gaussian(3.0))
    assert GdpFilter.from_state(gaussian.state_dict()) == gaussian
    for name in budget.state_dict():
        with pytest.raises(FedtuneError):
            RenyiFilter.from_state(budget.state_dict() | {name: "much"})
        with pytest.raises(FedtuneError):
            RenyiFilter.from_state({k: v for k, v in budget.state_dict().items() if k != name})
    for name in gaussian.state_dict():
        with pytest.raises(FedtuneError):
            GdpFilter.from_state(gaussian.state_dict() | {name: math.nan})


@settings(max_examples=30, deadline=None, derandomize=True)
@given(mu=st.floats(0.1, 5.0), noises=st.lists(st.floats(0.3, 20.0), max_size=80))
def test_gdp_filter_never_overspends(mu: float, noises: list[float]) -> None:
    budget = GdpFilter(mu)
    taken = [z for z in noises if budget.admit(Gaussian(z))]
    assert math.fsum(1 / z**2 for z in taken) <= mu**2
    assert len(taken) == budget.admitted
    if taken:
        total = policy.price({Gaussian(z): taken.count(z) for z in taken}, 1e-5, ADD)
        assert total <= gaussian_epsilon(mu, 1e-5) * (1 + 1e-9)


def test_gdp_filter_loses_nothing_and_takes_no_samples() -> None:
    budget = GdpFilter(mu_of(4.3772, 1e-5))
    assert [budget.admit(PoissonGaussian(1.0, 2.0)) for _ in range(5)] == [True] * 4 + [False]
    with pytest.raises(FedtuneError, match="in a GDP filter"):
        GdpFilter(1.0).admit(PoissonGaussian(0.1, 2.0))
    assert not GdpFilter(1.0).admit(Unbounded("lost"))
    for mu in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(FedtuneError):
            GdpFilter(mu)


def test_mu_of_is_within_the_budget() -> None:
    for epsilon in (0.1, 1.0, 10.0, 100.0):
        mu = mu_of(epsilon, 1e-5)
        assert gaussian_epsilon(mu, 1e-5) <= epsilon
        assert gaussian_epsilon(mu * (1 + 1e-6), 1e-5) > epsilon


@pytest.mark.parametrize(
    ("epsilon", "z", "order"), [(0.5, 2.640, 31), (2, 1.033, 8.3), (8, 0.620, 2.9)]
)
def test_golden_best_orders(epsilon: float, z: float, order: float) -> None:
    """With this noise a Renyi accountant fills epsilon in a thousand steps."""
    event = PoissonGaussian(512 / 50_000, z)
    found = best_order(epsilon, 1e-5, ADD, event)
    assert found == pytest.approx(order, rel=0.05)
    budget = RenyiFilter(found, epsilon, 1e-5, ADD)
    assert budget.budget / budget.cost(event) == pytest.approx(1000, rel=0.01)


def test_best_order_for_what_never_fits_is_refused() -> None:
    for event in (Gaussian(0.01), Unbounded("lost")):
        with pytest.raises(FedtuneError):
            best_order(1e-3, 1e-12, ADD, event)

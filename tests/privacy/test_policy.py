"""The bounds against other roads to the same number, and which of them is asked."""

import logging
import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from fedtune.privacy import bounds, distributions, policy
from fedtune.privacy.accounting import ORDERS, epsilon_of_rdp, rdp
from fedtune.privacy.events import Event, Gaussian, PoissonGaussian, Relation

ADD, ZERO = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_SPECIAL
DELTA = 1e-5


def price(event: Event, count: int, delta: float = DELTA, finest: float = policy.FINEST) -> float:
    return policy.price({event: count}, delta, ADD, finest)


# ---------------------------------------------------------------- against other roads


def test_orders_are_those_of_the_library() -> None:
    from dp_accounting.rdp import rdp_privacy_accountant

    assert tuple(rdp_privacy_accountant.DEFAULT_RDP_ORDERS) == ORDERS


@pytest.mark.parametrize(("q", "z", "count"), [(0.01, 1.0, 1000), (0.1, 2.0, 500), (1.0, 4.0, 100)])
def test_opacus_renyi_agrees(q: float, z: float, count: int) -> None:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(z, q, count)]
    epsilon, _ = accountant.get_privacy_spent(delta=DELTA)
    ours, order = epsilon_of_rdp(count * rdp(PoissonGaussian(q, z), ADD), DELTA)
    assert order <= 63  # the last that both have
    # The library's sum over the fractional orders overshoots a little.
    assert epsilon * (1 - 1e-9) <= ours <= epsilon * 1.0001


def test_stock_library_gives_the_printed_number() -> None:
    import dp_accounting as dp

    step = dp.PoissonSampledDpEvent(0.02, dp.GaussianDpEvent(1.5))
    event = dp.ComposedDpEvent([dp.SelfComposedDpEvent(step, 200), dp.GaussianDpEvent(5.0)])
    stock = dp.pld.PLDAccountant().compose(event).get_epsilon(DELTA)
    ours = policy.price({PoissonGaussian(0.02, 1.5): 200, Gaussian(5.0): 1}, DELTA, ADD)
    assert ours == pytest.approx(stock, rel=1e-6)


@pytest.mark.parametrize("relation", [ADD, ZERO])
@pytest.mark.parametrize(("q", "z"), [(0.1, 1.0), (0.5, 2.0)])
def test_one_sampled_release_against_the_closed_form(
    q: float, z: float, relation: Relation
) -> None:
    """Hockey-stick divergence of (1-q) N(0, z^2) + q N(1, z^2) from N(0, z^2), both ways."""

    def remove(epsilon: float) -> float:
        x = z * z * math.log((math.exp(epsilon) - 1 + q) / q) + 0.5
        return (1 - q - math.exp(epsilon)) * norm.sf(x / z) + q * norm.sf((x - 1) / z)

    def add(epsilon: float) -> float:
        if math.exp(-epsilon) <= 1 - q:
            return 0.0
        x = z * z * math.log((math.exp(-epsilon) - 1 + q) / q) + 0.5
        mixture = (1 - q) * norm.cdf(x / z) + q * norm.cdf((x - 1) / z)
        return norm.cdf(x / z) - math.exp(epsilon) * mixture

    epsilon = policy.price({PoissonGaussian(q, z): 1}, DELTA, relation)
    assert epsilon > 0.1
    assert max(remove(epsilon), add(epsilon)) <= DELTA
    assert max(remove(epsilon - 1e-4), add(epsilon - 1e-4)) > DELTA


def test_gaussian_closed_form_against_the_integral() -> None:
    for mu, epsilon in [(0.1, 0.2), (1.0, 4.0), (3.0, 10.0)]:
        tail, _ = quad(
            lambda x, mu=mu, e=epsilon: max(norm.pdf(x - mu) - math.exp(e) * norm.pdf(x), 0.0),
            epsilon / mu + mu / 2,
            mu + 40,
            epsabs=1e-16,
        )
        assert bounds.gaussian_log_delta(mu, epsilon) == pytest.approx(math.log(tail), rel=1e-6)


@pytest.mark.parametrize("mu", [1e-4, 0.01, 0.3, 1.0, 7.0, 100.0, 1e4])
@pytest.mark.parametrize("delta", [0.3, 1e-5, 1e-30])
def test_gaussian_epsilon_is_rounded_up_and_tight(mu: float, delta: float) -> None:
    epsilon = bounds.gaussian_epsilon(mu, delta)
    assert bounds.gaussian_log_delta(mu, epsilon) <= math.log(delta)
    if epsilon > 0:
        assert bounds.gaussian_log_delta(mu, epsilon * (1 - 1e-6)) > math.log(delta)


# ---------------------------------------------------------------- the policy


def test_grid_follows_the_size_of_the_answer() -> None:
    def grid(q: float, z: float, count: int, delta: float = DELTA) -> float | None:
        return policy.bound({PoissonGaussian(q, z): count}, delta, ADD).grid

    assert grid(0.1, 1.0, 1000) == 1e-3  # epsilon 25
    assert grid(0.001, 4.0, 1000) == 1e-5  # 0.02
    assert grid(0.1, 0.8, 10_000) is None  # 215, by Renyi
    assert grid(0.01, 4.0, 100, 1e-13) is None


def test_many_kinds_of_events_get_a_coarser_grid_and_then_renyi(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy, "MAX_FINE_EVENTS", 2)
    monkeypatch.setattr(policy, "MAX_EVENTS", 3)
    events: list[Event] = [PoissonGaussian(0.01, 2.0 + i) for i in range(4)]
    found = [policy.bound(dict.fromkeys(events[:n], 20), DELTA, ADD) for n in (2, 3, 4)]
    assert [one.grid for one in found] == [1e-4, 1e-3, None]
    assert [one.accountant for one in found] == ["pld", "pld", "rdp"]


def test_smaller_of_the_two_bounds_wins_either_way() -> None:
    # A million releases at a coarse step: here Renyi is the tighter one.
    event = PoissonGaussian(1e-3, 10.0)
    found = policy.bound({event: 1_000_000}, DELTA, ADD, policy.COARSE)
    assert found.accountant == "rdp"
    assert found.pld is not None
    assert found.epsilon == found.rdp < found.pld


def test_coarse_grids_are_upper_bounds() -> None:
    answers = [price(PoissonGaussian(0.02, 2.0), 100, finest=grid) for grid in (1e-2, 1e-3, 1e-4)]
    assert answers[0] > answers[1] > answers[2]


def test_million_releases_do_not_come_out_below_the_truth() -> None:
    # The library's transform alone answers 6.517 here.
    pld = distributions.composed_pld({PoissonGaussian(1.0, 1000.0): 1_000_000}, 1e-4, ADD)
    truth = bounds.gaussian_epsilon(1.0, 1e-10)
    assert pld.get_epsilon_for_delta(1e-10) < truth
    assert math.isinf(distributions.epsilon_of_pld(pld, 1_000_000, 1e-10))
    small = distributions.composed_pld({PoissonGaussian(1.0, 100.0): 10_000}, 1e-4, ADD)
    assert small.get_epsilon_for_delta(1e-10) < truth
    assert distributions.epsilon_of_pld(small, 10_000, 1e-10) >= truth


def test_library_is_silent_and_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    absl = logging.getLogger("absl")
    with caplog.at_level(logging.WARNING):
        absl.addHandler(caplog.handler)
        try:
            rdp(PoissonGaussian(0.31, 0.7), ADD)  # leaves out some orders, and would say so
            absl.warning("somebody else")
        finally:
            absl.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"somebody else"}
    assert np.isinf(rdp(PoissonGaussian(0.31, 0.7), ADD)).any()

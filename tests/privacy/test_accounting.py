import ast
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import bounds, distributions, groups, policy
from fedtune.privacy.accounting import (
    ORDERS,
    curve,
    epsilon_of_rdp,
    group_epsilon,
    most,
    noise_multiplier,
    rdp,
    require_delta,
    spent,
)
from fedtune.privacy.events import (
    Charge,
    Event,
    Gaussian,
    PoissonGaussian,
    Relation,
    TruncatedPoissonGaussian,
    Unbounded,
)

ADD, ZERO = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_SPECIAL
STEPS = {PoissonGaussian(0.01, 1.0): 1000}
DELTA = 1e-5


def price(event: Event, count: int, delta: float = DELTA, finest: float = policy.FINEST) -> float:
    return policy.price({event: count}, delta, ADD, finest)


# ---------------------------------------------------------------- golden values


@pytest.mark.parametrize(
    ("q", "z", "count", "epsilon"),
    [
        (0.01, 1.0, 1000, 1.8282),
        (0.01, 0.8, 1000, 3.1410),
        (0.1, 1.0, 100, 7.0466),
        (0.1, 2.0, 1000, 8.2793),
        (0.001, 0.5, 10_000, 5.2268),
    ],
)
def test_golden_poisson(q: float, z: float, count: int, epsilon: float) -> None:
    found = policy.bound({PoissonGaussian(q, z): count}, DELTA, ADD)
    assert round(found.epsilon, 4) == epsilon
    assert (found.accountant, found.grid) == ("pld", 1e-4)
    assert found.pld == found.epsilon < found.rdp


@pytest.mark.parametrize(("z", "count", "epsilon"), [(1.0, 1, 4.3772), (4.0, 100, 13.2067)])
def test_golden_gaussian(z: float, count: int, epsilon: float) -> None:
    found = spent([Charge(Gaussian(z), count)], DELTA, ADD)
    assert (round(found.epsilon, 4), found.accountant) == (epsilon, "analytic")
    assert found.mu == pytest.approx(math.sqrt(count) / z)
    assert found.epsilon_pld is None
    assert found.epsilon < found.epsilon_rdp


def test_golden_renyi() -> None:
    epsilon, order = epsilon_of_rdp(1000 * rdp(PoissonGaussian(0.01, 1.0), ADD), DELTA)
    assert (round(epsilon, 4), round(order, 1)) == (2.1014, 7.8)
    assert round(epsilon_of_rdp(rdp(Gaussian(1.0), ADD), DELTA)[0], 4) == 4.7285


def test_golden_truncated_poisson() -> None:
    event = TruncatedPoissonGaussian(0.01, 1.0, 10_000, 140)
    found = spent({event: 1000}, DELTA, ZERO)
    assert (round(found.epsilon, 4), found.accountant) == (1.9712, "pld")
    assert math.isinf(found.epsilon_rdp)
    with pytest.raises(FedtuneError, match="truncated Poisson sampling under") as caught:
        spent({event: 1000}, DELTA, ADD)
    assert caught.value.code is ExitCode.PRIVACY


def test_answer_says_everything() -> None:
    found = spent(STEPS, DELTA, ADD)
    assert found.delta == DELTA
    assert found.releases == 1000
    assert found.library == "dp-accounting 0.6.0"
    assert round(found.epsilon_rdp, 4) == 2.1014
    assert found.grid == 1e-4


# ---------------------------------------------------------------- composition


def test_sampling_everybody_is_no_sampling() -> None:
    assert price(PoissonGaussian(1.0, 3.0), 50) == price(Gaussian(3.0), 50)


def test_gaussian_releases_compose_into_one() -> None:
    together = spent({Gaussian(3.0): 9, Gaussian(4.0): 16}, DELTA, ZERO)
    assert together.epsilon == pytest.approx(price(Gaussian(math.sqrt(0.5)), 1), rel=1e-9)


def test_order_and_grouping_do_not_matter() -> None:
    a, b = PoissonGaussian(0.02, 1.5), PoissonGaussian(0.05, 3.0)
    one = spent([Charge(a, 30), Charge(b, 20), Charge(a, 10)], DELTA, ADD)
    other = spent({b: 20, a: 40}, DELTA, ADD)
    assert one == other


def test_three_jobs_on_the_same_people() -> None:
    jobs = [PoissonGaussian(0.01, 1.0), PoissonGaussian(0.02, 1.6), PoissonGaussian(0.015, 1.3)]
    each = [price(job, 500) for job in jobs]
    together = policy.price(dict.fromkeys(jobs, 500), DELTA, ADD)
    assert max(each) < together < sum(price(job, 500, DELTA / 3) for job in jobs)


def test_nothing_costs_nothing() -> None:
    for charges in ({}, [], [Charge(Gaussian(1.0), 0)]):
        found = spent(charges, DELTA, ADD)
        assert (found.epsilon, found.mu, found.releases) == (0.0, 0.0, 0)


def test_unbounded_is_infinite_for_ever() -> None:
    found = spent([*[Charge(e, n) for e, n in STEPS.items()], Charge(Unbounded("?"))], DELTA, ADD)
    assert math.isinf(found.epsilon)
    assert (found.accountant, found.mu, found.epsilon_pld) == ("none", None, None)


# ---------------------------------------------------------------- V17, V31, V32


@pytest.mark.parametrize("relation", list(Relation))
def test_v17_golden_values_for_each_relation(relation: Relation) -> None:
    """Replace-one would be 9.997, and 4.73 by the library's other accountant."""
    assert round(policy.price({Gaussian(1.0): 1}, DELTA, relation), 4) == 4.3772
    assert round(epsilon_of_rdp(rdp(Gaussian(1.0), relation), DELTA)[0], 4) == 4.7285
    assert round(policy.price(STEPS, DELTA, relation, policy.MIDDLE), 3) == 1.829


def test_v17_replace_one_is_neither_offered_nor_asked() -> None:
    assert {relation.name for relation in Relation} == {"ADD_OR_REMOVE_ONE", "REPLACE_SPECIAL"}
    with pytest.raises(FedtuneError):
        spent(STEPS, DELTA, "replace-one")  # type: ignore[arg-type]
    for path in Path(bounds.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Attribute) and node.attr == "REPLACE_ONE"), path


def test_v31_gaussian_approximations_are_never_the_number() -> None:
    rooms = Path(bounds.__file__).parents[1]
    for room in ("fedtune", "client", "server", "privacy", "simulations"):
        for path in (rooms / room).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for banned in ("GaussianAccountant", "PRVAccountant", "opacus.accountants"):
                assert banned not in text, f"{path} uses {banned}"


def test_v31_renyi_answers_that_are_no_bound_are_refused() -> None:
    from dp_accounting.rdp import rdp_privacy_accountant

    good = np.array(rdp(Gaussian(1.0), ADD))
    negative = good - 2
    assert rdp_privacy_accountant.compute_epsilon(ORDERS, negative, DELTA)[0] == 0  # the trap
    wrong = [negative, np.where(good > 5, np.nan, good), good[:-1], np.full(3, np.inf)]
    for vector in wrong:
        with pytest.raises(FedtuneError) as caught:
            epsilon_of_rdp(vector, DELTA)
        assert caught.value.code is ExitCode.PRIVACY
    assert epsilon_of_rdp(np.full(len(ORDERS), np.inf), DELTA) == (math.inf, 0.0)


class Answers:
    """A distribution that answers whatever it is told to."""

    def __init__(self, mass: float, epsilon: float) -> None:
        self.mass, self.epsilon = mass, epsilon

    def get_delta_for_epsilon(self, epsilon: float) -> float:
        return self.mass

    def get_epsilon_for_delta(self, delta: float) -> float:
        return self.epsilon


@pytest.mark.parametrize(
    ("mass", "epsilon"), [(0.99, 1.0), (math.nan, 1.0), (1.0, math.nan), (1.0, -0.1)]
)
def test_v31_distributions_that_are_none_are_refused(mass: float, epsilon: float) -> None:
    assert distributions.epsilon_of_pld(Answers(1.0, 1.0), 1, DELTA) == 1.0
    with pytest.raises(FedtuneError) as caught:
        distributions.epsilon_of_pld(Answers(mass, epsilon), 1, DELTA)
    assert caught.value.code is ExitCode.PRIVACY


@pytest.mark.parametrize(
    "event",
    [
        Gaussian(0.0),
        Gaussian(math.nan),
        Gaussian(1e-170),
        PoissonGaussian(0.0, 1.0),
        PoissonGaussian(1.5, 1.0),
        PoissonGaussian(0.1, -1.0),
        PoissonGaussian(0.1, math.inf),
        PoissonGaussian(0.1, 1e-170),
    ],
)
def test_v31_events_without_numbers_are_refused(event: Event) -> None:
    with pytest.raises(FedtuneError) as caught:
        spent({event: 1}, DELTA, ADD)
    assert caught.value.code is ExitCode.PRIVACY


@pytest.mark.parametrize("count", [-1, 1.5, True, math.nan])
def test_v31_impossible_counts_are_refused(count: float) -> None:
    with pytest.raises(FedtuneError):
        spent({Gaussian(1.0): count}, DELTA, ADD)  # type: ignore[dict-item]


@pytest.mark.parametrize("event", [Gaussian(0.01), PoissonGaussian(0.5, 0.01)])
def test_v31_hardly_any_noise_is_a_large_number_and_not_a_small_one(event: Event) -> None:
    assert price(event, 1) > 4000


Q = st.floats(1e-3, 0.3)
Z = st.floats(0.7, 6.0)
T = st.integers(1, 2000)
D = st.floats(-11.0, -3.0).map(lambda power: 10.0**power)
MORE = st.floats(1.02, 3.0)


def _grows(small: float, large: float) -> None:
    assert 0 <= small <= large * (1 + 1e-6) + 1e-9
    assert math.isfinite(large)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(q=Q, z=Z, count=T, delta=D, more=MORE)
def test_v31_epsilon_grows_with_everything_that_should_make_it_grow(
    q: float, z: float, count: int, delta: float, more: float
) -> None:
    def cost(q: float, z: float, count: int, delta: float) -> float:
        return price(PoissonGaussian(q, z), count, delta, policy.MIDDLE)

    assume(q * more < 1)
    here = cost(q, z, count, delta)
    _grows(here, cost(q, z, math.ceil(count * more), delta))
    _grows(here, cost(q * more, z, count, delta))
    _grows(here, cost(q, z / more, count, delta))
    _grows(here, cost(q, z, count, delta / more))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(z=st.floats(0.01, 1e4), count=st.integers(1, 10**6), delta=D, more=MORE)
def test_v31_closed_form_grows_too(z: float, count: int, delta: float, more: float) -> None:
    here = price(Gaussian(z), count, delta)
    _grows(here, price(Gaussian(z), count + 1, delta))
    _grows(here, price(Gaussian(z / more), count, delta))
    _grows(here, price(Gaussian(z), count, delta / more))
    assert here <= epsilon_of_rdp(count * rdp(Gaussian(z), ADD), delta)[0] + 1e-12


@settings(max_examples=15, deadline=None, derandomize=True)
@given(q=st.floats(1e-9, 1.0), z=st.floats(0.05, 1e4))
def test_v31_renyi_vectors_are_numbers(q: float, z: float) -> None:
    vector = rdp(PoissonGaussian(q, z), ADD)
    assert (vector > 0).all()
    assert vector.shape == (len(ORDERS),)
    with pytest.raises(ValueError, match="read-only"):
        vector[0] = 0.0
    gaussian = np.array(ORDERS) / (2 * z * z) + 1e-13
    whole = [order.is_integer() for order in ORDERS]
    assert (vector[whole] <= gaussian[whole] * (1 + 1e-9)).all()  # sampling never costs


def test_v32_delta_at_or_above_one_over_the_units_is_refused() -> None:
    require_delta(0.99e-3, 1000)
    for delta, units in [(1e-3, 1000), (0.5, 2), (1e-5, 200_000), (0.1, 0), (0.0, 10), (1.0, 1)]:
        with pytest.raises(FedtuneError) as caught:
            require_delta(delta, units)
        assert caught.value.code is ExitCode.PRIVACY
    with pytest.raises(FedtuneError):
        require_delta(math.nan, 10)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
def test_v32_delta_that_is_none_is_refused_everywhere(delta: float) -> None:
    for ask in (
        lambda: spent(STEPS, delta, ADD),
        lambda: epsilon_of_rdp(rdp(Gaussian(1.0), ADD), delta),
        lambda: most(Gaussian(1.0), 1.0, delta, ADD),
        lambda: noise_multiplier(1.0, delta, ADD, 1, Gaussian),
        lambda: group_epsilon(STEPS, delta, ADD, 2),
    ):
        with pytest.raises(FedtuneError, match="delta"):
            ask()


# ---------------------------------------------------------------- mu


def test_mu_covers_the_whole_profile_up_to_delta() -> None:
    found = spent(STEPS, DELTA, ADD)
    assert found.mu is not None
    assert bounds.gaussian_epsilon(found.mu, DELTA) >= found.epsilon
    pld = distributions.composed_pld(STEPS, 1e-3, ADD)
    for epsilon in np.linspace(0, found.epsilon, 33):
        covered = math.exp(bounds.gaussian_log_delta(found.mu, epsilon))
        assert covered >= 0.995 * pld.get_delta_for_epsilon(float(epsilon))
    smaller = math.exp(bounds.gaussian_log_delta(found.mu * 0.99, found.epsilon))
    assert smaller < DELTA


def test_no_mu_without_a_distribution() -> None:
    assert spent({PoissonGaussian(0.1, 0.8): 10_000}, DELTA, ADD).mu is None


# ---------------------------------------------------------------- planning


@pytest.mark.parametrize(("epsilon", "table"), [(0.5, 2.442), (1.0, 1.441), (2.0, 0.971)])
def test_golden_noise_multipliers(epsilon: float, table: float) -> None:
    """The table was made on a grid of 1e-3, so ours may be a little smaller."""

    def make(z: float) -> Event:
        return PoissonGaussian(512 / 50_000, z)

    assert price(make(table), 1000, finest=1e-3) == pytest.approx(epsilon, rel=2.5e-3)
    z = noise_multiplier(epsilon, DELTA, ADD, 1000, make)
    assert z == pytest.approx(table, rel=5e-3)
    assert float(f"{z:.3e}") == z
    assert (
        price(make(z), 1000)
        <= epsilon
        < price(make(z - 10.0 ** (math.floor(math.log10(z)) - 3)), 1000)
    )


def test_noise_multiplier_without_sampling_is_exact() -> None:
    z = noise_multiplier(4.3772, DELTA, ADD, 100, Gaussian)
    assert z == 10.0
    assert noise_multiplier(4.3771, DELTA, ADD, 100, Gaussian) == 10.01


def test_noise_multiplier_of_truncated_poisson() -> None:
    def make(z: float) -> Event:
        return TruncatedPoissonGaussian(0.1, z, 300, 60)

    z = noise_multiplier(0.6, DELTA, ZERO, 50, make)
    assert policy.price({make(z): 50}, DELTA, ZERO) <= 0.6
    assert policy.price({make(z * 0.995): 50}, DELTA, ZERO) > 0.6


def test_noise_multiplier_that_does_not_exist_is_refused() -> None:
    with pytest.raises(FedtuneError, match="no noise multiplier"):
        noise_multiplier(1e-9, 1e-12, ADD, 10**6, Gaussian)
    for epsilon in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(FedtuneError, match="epsilon"):
            noise_multiplier(epsilon, DELTA, ADD, 1, Gaussian)
    with pytest.raises(FedtuneError, match="count"):
        noise_multiplier(1.0, DELTA, ADD, 0, Gaussian)


def test_most_fills_the_budget_and_not_more() -> None:
    event, before = PoissonGaussian(0.02, 1.5), {Gaussian(8.0): 2, PoissonGaussian(0.02, 1.5): 50}
    count = most(event, 2.0, DELTA, ADD, before)
    assert count > 100
    assert policy.price(before | {event: 50 + count}, DELTA, ADD) <= 2.0
    assert policy.price(before | {event: 50 + count + 1}, DELTA, ADD) > 2.0


def test_most_of_a_gaussian_is_arithmetic() -> None:
    assert most(Gaussian(10.0), 4.3772, DELTA, ADD, {Gaussian(2.0): 3}) == 25
    assert most(Gaussian(10.0), 4.3771, DELTA, ADD, {Gaussian(2.0): 3}) == 24


def test_most_is_nothing_when_nothing_fits() -> None:
    assert most(Gaussian(1.0), 1.0, DELTA, ADD, {Gaussian(1.0): 5}) == 0
    assert most(Gaussian(1.0), 1.0, DELTA, ADD, {Unbounded("lost"): 1}) == 0
    assert most(Unbounded("lost"), 1.0, DELTA, ADD, {}) == 0
    assert most(Gaussian(0.5), 1.0, DELTA, ADD, {}) == 0


def test_curve_rises_to_what_was_spent() -> None:
    charges = [Charge(PoissonGaussian(0.05, 2.0), 30), Charge(Gaussian(5.0)), Charge(Gaussian(9.0))]
    found = curve(charges, DELTA, ADD, points=8)
    counts, epsilons = zip(*found, strict=True)
    assert counts == (4, 8, 12, 16, 20, 24, 28, 32)
    assert list(epsilons) == sorted(epsilons)
    assert epsilons[-1] == pytest.approx(spent(charges, DELTA, ADD).epsilon)
    assert epsilons[6] == pytest.approx(price(PoissonGaussian(0.05, 2.0), 28))
    assert curve([Charge(Gaussian(1.0), 2)], DELTA, ADD, points=100)[0][0] == 1
    assert curve([], DELTA, ADD) == []


# ---------------------------------------------------------------- V33


@pytest.mark.parametrize(("k", "golden", "even"), [(2, 3.979, 4.24), (4, 8.899, 11.84)])
def test_v33_records_of_one_person(k: int, golden: float, even: float) -> None:
    exact = group_epsilon(STEPS, DELTA, ADD, k, exact=True)
    generic = group_epsilon(STEPS, DELTA, ADD, k)
    naive = k * price(PoissonGaussian(0.01, 1.0), 1000)  # too small, and so invalid
    assert exact == pytest.approx(golden, abs=6e-4)
    assert naive < exact < generic < even  # the last splits epsilon evenly


def test_v33_eight_records_of_one_person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MAX_BINS", 60_000)  # takes a grid of 1e-2: seconds less
    exact = group_epsilon(STEPS, DELTA, ADD, 8, exact=True)
    assert 20.895 < exact < 20.895 * 1.005
    assert 8 * price(PoissonGaussian(0.01, 1.0), 1000) < exact
    assert exact < group_epsilon(STEPS, DELTA, ADD, 8) < 31


def test_v33_without_sampling_sensitivities_add() -> None:
    for exact in (False, True):
        found = group_epsilon({Gaussian(12.0): 4}, DELTA, ADD, 3, exact=exact)
        assert found == price(Gaussian(4.0), 4)
    assert found > 3 * price(Gaussian(12.0), 4)


def test_v33_one_record_is_no_group() -> None:
    assert group_epsilon(STEPS, DELTA, ADD, 1) == price(PoissonGaussian(0.01, 1.0), 1000)


def test_v33_sampled_and_unsampled_releases_together() -> None:
    mixed = {PoissonGaussian(0.05, 1.5): 100, Gaussian(20.0): 1}
    exact = group_epsilon(mixed, DELTA, ADD, 2, exact=True)
    alone = group_epsilon({PoissonGaussian(0.05, 1.5): 100}, DELTA, ADD, 2, exact=True)
    assert alone < exact < group_epsilon(mixed, DELTA, ADD, 2)


def test_v33_what_cannot_be_said_is_refused_or_infinite() -> None:
    assert math.isinf(group_epsilon({Unbounded("lost"): 1}, DELTA, ADD, 2))
    truncated = {TruncatedPoissonGaussian(0.1, 4.0, 300, 60): 40}
    with pytest.raises(FedtuneError, match="no exact group"):
        group_epsilon(truncated, DELTA, ZERO, 2, exact=True)
    assert group_epsilon(truncated, DELTA, ZERO, 2) > 2 * policy.price(truncated, DELTA, ZERO)
    with pytest.raises(FedtuneError, match="too many"):
        group_epsilon(STEPS, DELTA, ADD, 1000, exact=True)
    for k in (0, -1, True, 1.5):
        with pytest.raises(FedtuneError, match="records"):
            group_epsilon(STEPS, DELTA, ADD, k)  # type: ignore[arg-type]

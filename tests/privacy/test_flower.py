"""The ledger behind Flower's accountant protocol, driven by Flower's own strategy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    RdpAccountant,
    SamplingMethod,
)
from flwr.serverapp.exception import PrivacyBudgetExhausted
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.dp_fixed_clipping import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import accounting
from fedtune.privacy.events import Gaussian, PoissonGaussian, Relation, Unbounded, Unit
from fedtune.privacy.flower import LedgerAccountant
from fedtune.privacy.ledger import Account, Claim, Ledger, open_ledger
from fedtune.simulations.executors import ThreadExecutor
from fedtune.simulations.grid import LocalGrid
from tests.privacy.ledgers import ADD, DELTA, refused

CLIENTS, COHORT, Z, CLIP = 6, 3, 8.0, 0.5
EVENT = GaussianPrivacyEvent(Z, COHORT, CLIENTS)
CHARGED = Gaussian(Z / 2)
"""A cohort of fixed size: somebody else takes the place of who is not there."""


def config(
    max_epsilon: float | None = None,
    sampling: SamplingMethod = SamplingMethod.NO_AMPLIFICATION,
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    population: int = CLIENTS,
) -> PrivacyConfig:
    return PrivacyConfig(DELTA, population, relation, sampling, max_epsilon)


@pytest.fixture
def account(small: Ledger) -> Account:
    return small.account("phones", Unit.CLIENT, ADD)


def federation(
    strategy: type[Any], accountant: Any, rounds: int, lie: bool = False
) -> tuple[list[int], Any]:
    """Run a strategy of Flower's over six clients; return the rounds they saw, and the result."""
    app, seen = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(1)
        (name, arrays), *_ = message.content.array_records.items()
        moved = [array + 1.0 for array in arrays.to_numpy_ndarrays()]
        weight = len(seen) if lie else 1
        reply = RecordDict({name: ArrayRecord(moved), "m": MetricRecord({"num-examples": weight})})
        return Message(reply, reply_to=message)

    inner = FedAvg(
        fraction_train=COHORT / CLIENTS, fraction_evaluate=0.0, min_train_nodes=COHORT,
        min_available_nodes=CLIENTS,
    )  # fmt: skip
    private = strategy(inner, Z, CLIP, COHORT, accountant=accountant)
    grid = LocalGrid(ThreadExecutor(app, 1), CLIENTS)
    try:
        result = private.start(grid, ArrayRecord([np.zeros(4, np.float32)]), num_rounds=rounds)
    finally:
        grid.close()
    return seen, result


@pytest.mark.parametrize(
    "strategy",
    [DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyClientSideFixedClipping],
)
def test_a_strategy_charges_each_round_that_it_releases(
    small: Ledger, account: Account, strategy: type[Any]
) -> None:
    accountant = LedgerAccountant(small, account, config(), "job")
    seen, result = federation(strategy, accountant, rounds=3)
    assert len(seen) == 3 * COHORT
    assert small.groups(account) == {CHARGED: 3}
    assert accountant.num_releases == 3
    entries = small.entries(account)
    assert [entry.kind for entry in entries] == ["reserve", "release"] * 3
    assert [entry.round for entry in entries[::2]] == [0, 1, 2]
    assert entries[0].detail["flower"] == {
        "noise_multiplier": Z, "sample_size": COHORT, "population_size": CLIENTS,
    }  # fmt: skip
    spent = accountant.get_privacy_spent()
    assert spent.epsilon == accounting.spent({CHARGED: 3}, DELTA, ADD).epsilon
    assert (spent.delta, spent.num_releases, spent.accounting_method) == (DELTA, 3, "analytic")
    assert not np.allclose(next(iter(result.arrays.to_numpy_ndarrays())), 0.0)
    small.verify()


def test_the_strategy_stops_before_the_round_that_does_not_fit(
    small: Ledger, account: Account
) -> None:
    """The owner's cap alone: the strategy is told that there is one."""
    account = small.set_budget(account, 2.0, DELTA, "owner", "agreed")
    fits = accounting.most(CHARGED, 2.0, DELTA, ADD, {})
    assert 1 < fits < 8
    accountant = LedgerAccountant(small, account, config(), "job")
    assert accountant.config.max_epsilon == 2.0
    with pytest.raises(PrivacyBudgetExhausted):
        federation(DifferentialPrivacyServerSideFixedClipping, accountant, rounds=9)
    assert small.groups(account) == {CHARGED: fits}
    # Another run, another process: what was spent is spent.
    again = LedgerAccountant(open_ledger(small.store.where), account, config(), "next job")
    with pytest.raises(PrivacyBudgetExhausted):
        federation(DifferentialPrivacyServerSideFixedClipping, again, rounds=1)


def test_a_sum_that_another_job_has_outrun_never_leaves(small: Ledger, account: Account) -> None:
    """Between the check and the release somebody else takes the last of the budget."""
    account = small.set_budget(account, 2.0, DELTA, "owner", "agreed")
    fits = accounting.most(CHARGED, 2.0, DELTA, ADD, {})
    small.reserve(account, Claim("job", 0, 0, CHARGED, fits - 1))
    accountant = LedgerAccountant(small, account, config(), "flower")
    assert not accountant.would_exceed(EVENT)
    small.reserve(account, Claim("another", 0, 0, CHARGED))
    assert accountant.would_exceed(EVENT)
    with refused(ExitCode.BUDGET_EXHAUSTED):
        accountant.compose(EVENT)
    assert small.groups(account) == {CHARGED: fits}


def test_poisson_is_flowers_number_or_smaller(small: Ledger, account: Account) -> None:
    given = config(sampling=SamplingMethod.POISSON, population=1000)
    ours, theirs = LedgerAccountant(small, account, given, "job"), RdpAccountant(given)
    event = GaussianPrivacyEvent(1.0, 10, 1000)
    for accountant in (ours, theirs):
        accountant.compose(event, 900)
        accountant.compose(event, count=100)
    assert small.groups(account) == {PoissonGaussian(0.01, 1.0): 1000}
    assert theirs.get_epsilon(DELTA) == pytest.approx(2.1014, abs=1e-4)
    assert ours.get_epsilon(DELTA) == pytest.approx(1.8282, abs=1e-4)
    assert ours.num_releases == theirs.num_releases == 1000
    assert ours.get_delta(2.1014) == pytest.approx(theirs.get_delta(2.1014), rel=1e-6)
    assert ours.get_delta(100.0) < 1e-30
    assert ours.get_privacy_spent(1e-6).delta == 1e-6


def test_a_fixed_cohort_costs_twice_the_clip_norm(small: Ledger, account: Account) -> None:
    """Flower charges half of what the swap of two clients can move; we charge all of it."""
    ours, theirs = LedgerAccountant(small, account, config(), "job"), RdpAccountant(config())
    ours.compose(EVENT)
    theirs.compose(EVENT)
    twice = RdpAccountant(config())
    twice.compose(GaussianPrivacyEvent(Z / 2, COHORT, CLIENTS))
    assert theirs.get_epsilon(DELTA) < ours.get_epsilon(DELTA) <= twice.get_epsilon(DELTA)


def test_would_exceed_changes_nothing_and_agrees_with_get_epsilon(
    small: Ledger, account: Account
) -> None:
    accountant = LedgerAccountant(small, account, config(max_epsilon=1.5), "job")
    assert accountant.config.max_epsilon == 1.5
    fits = accounting.most(CHARGED, 1.5, DELTA, ADD, {})
    assert not accountant.would_exceed(EVENT, count=fits)
    assert accountant.would_exceed(EVENT, count=fits + 1)
    assert not accountant.would_exceed(EVENT, max_epsilon=9.0, count=fits + 1)
    assert small.entries() == []
    small.set_budget(account, 0.5, DELTA, "owner", "less")
    assert accountant.would_exceed(EVENT, max_epsilon=9.0, count=fits)
    free = LedgerAccountant(small, small.account("free", Unit.CLIENT, ADD), config(), "job")
    with refused(ExitCode.PRIVACY):
        free.would_exceed(EVENT)


def test_every_job_on_the_people_counts(small: Ledger, account: Account) -> None:
    small.reserve(account, Claim("tuning", 0, 0, Gaussian(5.0), 3))
    accountant = LedgerAccountant(small, account, config(max_epsilon=2.0), "job")
    assert accountant.num_releases == 3
    assert accountant.get_epsilon(DELTA) == small.spent(account, DELTA).epsilon > 0
    accountant.compose(EVENT)
    assert accountant.num_releases == 4
    small.reserve(account, Claim("leak", 0, 0, Unbounded("exact metrics")))
    assert accountant.get_epsilon(DELTA) == math.inf
    assert accountant.get_delta(3.0) == 1.0
    assert accountant.would_exceed(EVENT)


def test_two_accountants_of_one_job_never_share_a_charge(small: Ledger, account: Account) -> None:
    one, two = (LedgerAccountant(small, account, config(), "job") for _ in range(2))
    for _ in range(3):
        one.compose(EVENT)
        two.compose(EVENT)
    assert small.groups(account) == {CHARGED: 6}


def test_v29_a_state_never_lowers_the_ledger(small: Ledger, account: Account) -> None:
    accountant = LedgerAccountant(small, account, config(), "job")
    assert accountant.num_releases == 0
    early = json.loads(json.dumps(accountant.state_dict()))
    accountant.compose(EVENT, 5)
    late = json.loads(json.dumps(accountant.state_dict()))
    accountant.compose(EVENT)
    for state in (early, late):
        accountant.load_state_dict(state)
        assert accountant.num_releases == 6
    empty = open_ledger(Path(small.store.where).with_name("new.db"))
    lost = LedgerAccountant(empty, empty.account("phones", Unit.CLIENT, ADD), config(), "job")
    lost.load_state_dict(early)
    with pytest.raises(FedtuneError, match="the ledger holds 0 x") as caught:
        lost.load_state_dict(late)
    assert caught.value.code == ExitCode.LEDGER


@pytest.mark.parametrize(
    "change",
    [{"schema_version": 2}, {"backend": "rdp"}, {"config": {}}, {"groups": None}, {"groups": [1]},
     {"groups": [{"event": {}, "count": "5"}]}, {"account": ["other", "client", ADD.value]}],
    ids=str,
)  # fmt: skip
def test_a_foreign_state_is_refused(
    small: Ledger, account: Account, change: dict[str, Any]
) -> None:
    accountant = LedgerAccountant(small, account, config(), "job")
    with refused(ExitCode.PRIVACY):
        accountant.load_state_dict(accountant.state_dict() | change)


@pytest.mark.parametrize(
    "given",
    [
        config(
            sampling=SamplingMethod.WITHOUT_REPLACEMENT, relation=NeighboringRelation.REPLACE_ONE
        ),
        PrivacyConfig(
            0.2, 6, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION
        ),
    ],
)
def test_what_has_no_true_account_is_refused(
    small: Ledger, account: Account, given: PrivacyConfig
) -> None:
    with refused(ExitCode.PRIVACY):
        LedgerAccountant(small, account, given, "job")


def test_an_account_with_another_relation_or_population_is_refused(small: Ledger) -> None:
    special = small.account("tablets", Unit.CLIENT, Relation.REPLACE_SPECIAL)
    with refused(ExitCode.PRIVACY):
        LedgerAccountant(small, special, config(), "job")
    account = small.account("phones", Unit.CLIENT, ADD)
    accountant = LedgerAccountant(small, account, config(), "job")
    with refused(ExitCode.PRIVACY):
        accountant.compose(GaussianPrivacyEvent(Z, COHORT, CLIENTS + 1))
    for epsilon in (-1.0, math.nan, math.inf, True):
        with refused(ExitCode.PRIVACY):
            accountant.get_delta(epsilon)


def test_v25_unequal_weights_are_refused_by_flower_and_nothing_is_charged(
    small: Ledger, account: Account
) -> None:
    accountant = LedgerAccountant(small, account, config(), "job")
    with pytest.raises(ValueError, match="equal client weights"):
        federation(DifferentialPrivacyServerSideFixedClipping, accountant, 1, lie=True)
    assert small.groups(account) == {}

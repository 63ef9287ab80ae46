"""What the server says of a run whose noise moves: charges are rounds there, not releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.accounting import epsilon_of_rdp, rdp, spent
from fedtune.privacy.events import Gaussian, Levels, RenyiFiltered, Unit
from fedtune.privacy.forecast import forecast
from fedtune.privacy.ledger import Claim, Ledger, open_ledger
from fedtune.privacy.plan import Promise, dataset_name, promises
from fedtune.privacy.rldp.levels import noise_book
from fedtune.server.disclose import _require_all
from fedtune.server.private import Central
from fedtune.server.rounds import _bounds
from fedtune.server.snapshot_budget import Known, budgets_of
from tests.server.standing import CLIENT, EXAMPLE, Run

LOUD = {"epsilon": 0.0, "noise_multiplier": 0.3, "clip": "rldp"}
"""Beyond what distributions are asked for: answers take no time."""


def moving(place: Path, noise: str, unit: str = "example", **changes: Any) -> tuple[Run, Promise]:
    rldp = {"noise": noise, "mode": "online"}
    if unit == "client":
        rldp |= {"reward": "public", "public": "public.jsonl"}
    base = EXAMPLE if unit == "example" else CLIENT
    run = Run(place, **{unit: base | LOUD | {"rldp": rldp}})
    if changes:
        table = run.config.model_dump(exclude_unset=True)
        table["privacy"][unit] |= changes
        table["federation"]["cohort"] = 1.0
        run.config = Config.model_validate(table)
    (promise,) = promises(run.config)
    return run, promise


def charged(run: Run, promise: Promise, rounds: int, name: str) -> Ledger:
    ledger = open_ledger(run.folder.books if "/" in name else run.config.privacy.ledger)
    account = ledger.account(name, promise.unit, promise.relation)
    for number in range(1, rounds + 1):
        z = noise_book(promise).take(promise.least_noise)
        assert z is not None
        charge = promise.charge_at(z)
        claim = Claim(run.folder.job(), number, 0, charge.event, charge.count)
        ledger.release(ledger.reserve(account, claim))
    return ledger


@pytest.mark.parametrize(("noise", "kind"), [("order", Levels), ("filtered", RenyiFiltered)])
def test_rounds_at_the_clients(noise: str, kind: type, tmp_path: Path) -> None:
    run, promise = moving(tmp_path, noise)
    assert isinstance(promise.charge.event, kind)
    ledger = charged(run, promise, 3, f"{dataset_name(run.config)}/a")
    rows = [{"round": 3}]
    (found,) = budgets_of(run.folder, run.config, {"job": run.folder.job()}, rows, 0.0, Known())
    assert found.epsilon == pytest.approx(promise.spent(3).epsilon)
    assert "asked most often" in found.words
    fast = _bounds((promise,), 3, None)["epsilon_example"]
    assert fast == epsilon_of_rdp(3 * rdp(promise.charge.event, promise.relation), promise.delta)[0]
    assert fast >= found.epsilon * (1 - 1e-9)
    extract = ledger.extract(run.folder.job(), compact=True)
    _require_all(run.config, extract, 3)
    with pytest.raises(FedtuneError, match="3 charges") as caught:
        _require_all(run.config, extract, 4)
    assert caught.value.code is ExitCode.LEDGER
    made = forecast(promise, parameters=100)
    assert [n for n, _ in made["curve"]] == [1, 2, 3, 4]
    assert made["curve"][-1][1] == made["epsilon"] == promise.spent().epsilon
    assert made["releases_per_round"] == promise.releases


@pytest.mark.parametrize("sampler", ["everyone", "poisson"])
def test_rounds_at_the_server(sampler: str, tmp_path: Path) -> None:
    """The noise of each round was chosen: what is said is of what was charged."""
    changes = {"sampler": sampler} if sampler == "everyone" else {}
    run, promise = moving(tmp_path, "filtered", "client", **changes)
    name = dataset_name(run.config)
    ledger = charged(run, promise, 3, name)
    account = ledger.account(name, Unit.CLIENT, promise.relation)
    groups = ledger.groups(account, run.folder.job())
    (event,) = groups
    planned = promise.charge.event
    assert event != planned
    exact = spent(groups, promise.delta, promise.relation).epsilon
    assert exact > promise.spent(3).epsilon
    facts, rows = {"job": run.folder.job()}, [{"round": 3}]
    (found,) = budgets_of(run.folder, run.config, facts, rows, 0.0, Known())
    assert found.epsilon == pytest.approx(exact)
    central = Central(promise, ledger, account, run.folder.job(), source=None)  # type: ignore[arg-type]
    fast = _bounds((promise,), 3, central)["epsilon_client"]
    renyi = epsilon_of_rdp(3 * rdp(event, promise.relation), promise.delta)[0]
    assert promise.limit is not None
    assert fast == max(renyi, promise.limit[0])
    if isinstance(event, Gaussian):
        assert event.noise_multiplier == promise.least_noise < 0.3
    _require_all(run.config, ledger.extract(run.folder.job(), compact=True), 3)

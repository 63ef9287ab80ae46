"""What the server says of a run whose noise moves: charges are rounds there, not releases."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.accounting import epsilon_of_rdp, rdp
from fedtune.privacy.events import Levels, RenyiFiltered
from fedtune.privacy.forecast import forecast
from fedtune.privacy.ledger import Claim, Ledger, open_ledger
from fedtune.privacy.plan import Promise, dataset_name, promises
from fedtune.server.disclose import _require_all
from fedtune.server.rounds import _bounds
from fedtune.server.snapshot_budget import Known, budgets_of
from tests.server.standing import EXAMPLE, Run

LOUD = {"epsilon": 0.0, "noise_multiplier": 0.3, "clip": "rldp"}
"""Beyond what distributions are asked for: answers take no time."""


def moving(place: Path, noise: str) -> tuple[Run, Promise]:
    run = Run(place, example=EXAMPLE | LOUD | {"rldp": {"noise": noise, "mode": "online"}})
    (promise,) = promises(run.config)
    return run, promise


def charged(run: Run, promise: Promise, rounds: int) -> Ledger:
    ledger = open_ledger(run.folder.books)
    account = ledger.account(f"{dataset_name(run.config)}/a", promise.unit, promise.relation)
    for number in range(1, rounds + 1):
        charge = promise.charge
        claim = Claim(run.folder.job(), number, 0, charge.event, charge.count)
        ledger.release(ledger.reserve(account, claim))
    return ledger


@pytest.mark.parametrize(("noise", "kind"), [("order", Levels), ("filtered", RenyiFiltered)])
def test_rounds_at_the_clients(noise: str, kind: type, tmp_path: Path) -> None:
    run, promise = moving(tmp_path, noise)
    assert isinstance(promise.charge.event, kind)
    ledger = charged(run, promise, 3)
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

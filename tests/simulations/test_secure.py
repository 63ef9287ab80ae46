"""Simulated runs of which the server sees sums alone: the same model, and the promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.ledger import open_ledger
from fedtune.server.checkpoint import State, latest
from fedtune.server.run_folder import RunFolder, create
from fedtune.simulations.simulate import simulate
from tests.simulations.apps import settings

COMMON: dict[str, Any] = {
    "data__holdout": 0.0, "data__pack": False, "data__max_length": 16, "tuning__steps": 2,
    "federation__weighting": "uniform", "federation__rounds": 2, "evaluation__clients": 0,
    "engine__executor": "threads", "engine__workers": 1,
}  # fmt: skip
SECURE = {"clip_norm": 20.0}
SHARES: dict[str, Any] = {
    "relation": "replace-special", "population": 4, "delta": 1e-3, "noise_multiplier": 2.0,
    "noise_at": "clients", "sampler": "everyone", "clip_norm": 0.5,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "prompt": {"tuning__adapter": "prompt", "tuning__tokens": 4},
    "coefficients": {
        "tuning__method": "seedpool", "tuning__adapter": "full", "tuning__pool__size": 64,
        "tuning__pool__groups": 1,
        "tuning__pool__engine": "probes", "tuning__lr": 1e-3, "tuning__optimizer": "sgd",
    },
}  # fmt: skip


def run(folder: Path, shared: Path, **changes: Any) -> tuple[RunFolder, State]:
    ledger = {"privacy__ledger": str(folder / "ledger.db")}
    config = settings(folder, shared, **(COMMON | ledger | changes))
    home = create(config)
    simulate(config, home, lambda event: None)
    print_ = json.loads((home.path / "run.json").read_text()).get("fingerprint", "")
    state = latest(home, print_) if print_ else _latest(home)
    assert state is not None
    return home, state


def _latest(home: RunFolder) -> State | None:
    from fedtune.server.tuned import load_tuned

    config = home.config()
    return latest(home, load_tuned(config, tuple(home.status().get("labels", ()))).fingerprint)


@pytest.mark.parametrize("kind", KINDS)
def test_a_secure_sum_gives_the_plain_mean(tmp_path: Path, shared: Path, kind: str) -> None:
    # One round: what the grid moves by a hair, the optimiser of the next may move by more.
    kinds = KINDS[kind] | {"federation__rounds": 1}
    _, plain = run(tmp_path / "plain", shared, **kinds)
    home, masked = run(tmp_path / "secure", shared, federation__secure=SECURE, **kinds)
    for name, value in plain.adapter.items():
        moved = float(np.abs(value).max())
        assert moved > 0
        np.testing.assert_allclose(masked.adapter[name], value, atol=5e-4)
    rows = home.client_rows()
    assert {row["outcome"] for row in rows} == {"ok"}
    assert all("loss" not in row and "examples" not in row for row in rows)
    assert not any("train_loss" in row for row in home.metrics())


def test_noise_of_all_clients_is_charged_and_said(tmp_path: Path, shared: Path) -> None:
    home, state = run(
        tmp_path / "a", shared, privacy__client=SHARES, federation__secure={"threshold": 0.75}
    )
    _, other = run(
        tmp_path / "b", shared, privacy__client=SHARES, federation__secure={"threshold": 0.75}
    )
    name = min(state.adapter)
    assert not np.array_equal(state.adapter[name], other.adapter[name])  # nobody's seed
    ledger = open_ledger(tmp_path / "a" / "ledger.db")
    accounts = {one.dataset: one for one in ledger.accounts()}
    assert all(one.unit is Unit.CLIENT for one in accounts.values())
    assert all(one.relation is Relation.REPLACE_SPECIAL for one in accounts.values())
    # The server for its whole round, and every client at its own ledger.
    counts = {one: sum(ledger.groups(account).values()) for one, account in accounts.items()}
    assert len(counts) == 5
    assert set(counts.values()) == {2}
    statement = json.loads((home.adapter / "privacy.json").read_text())
    assert statement["differential_privacy"] is True
    assert "noise" in json.dumps(statement)


def test_what_needs_single_updates_is_refused(tmp_path: Path, shared: Path) -> None:
    for change in (
        {"federation__aggregation": "median"}, {"federation__weighting": "examples"},
        {"federation__secure": {"threshold": 0.5}}, {"federation__secure": {"min_cohort": 1}},
        {"federation__secure": {"colluding": 2}},
    ):  # fmt: skip
        tables = {"federation__secure": SECURE, **change}
        with pytest.raises((FedtuneError, ValueError)):
            settings(tmp_path, shared, **(COMMON | tables))


def test_too_few_clients_give_no_sum(tmp_path: Path, shared: Path) -> None:
    """Four of a floor of five: no round, and no sum on disk."""
    config = settings(
        tmp_path, shared, **(COMMON | {"federation__secure": SECURE | {"min_cohort": 5}})
    )
    home = create(config)
    with pytest.raises(FedtuneError) as caught:
        simulate(config, home, lambda event: None)
    assert caught.value.code == ExitCode.QUORUM
    assert not (home.path / "sum.safetensors").exists()
    assert [row["round"] for row in home.metrics()] == [0]

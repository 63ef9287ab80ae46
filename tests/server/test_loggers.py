"""Every logger really writes, and what it wrote is read back with its own library."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Config, OutputConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.events import ClientDone, RoundDone, RoundStarted
from fedtune.server.loggers import open_loggers
from fedtune.server.run_folder import RunFolder, create

LOSSES = [4.0, 2.5, 1.25]


def run_of(folder: Path, *names: Any) -> tuple[Config, RunFolder]:
    config = Config(name="logged", output=OutputConfig(folder=str(folder), loggers=names))
    return config, create(config)


def tell(config: Config, folder: RunFolder) -> None:
    """A short run, as a logger hears it."""
    with open_loggers(config, folder) as hear:
        for number, loss in enumerate(LOSSES):
            hear(RoundStarted(number, 0, 2))
            hear(ClientDone(number, "a", "late", "no answer", 0))
            row = {"round": number, "loss": loss, "bytes_up": 1000 + number, "note": "text"}
            hear(RoundDone(number, row))


def test_no_logger_is_fine(tmp_path: Path) -> None:
    config, folder = run_of(tmp_path)
    before = sorted(p.name for p in folder.path.iterdir())
    tell(config, folder)
    assert sorted(p.name for p in folder.path.iterdir()) == before


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, folder = run_of(tmp_path, "tensorboard")
    tell(config, folder)
    found = EventAccumulator(str(folder.path / "tensorboard"))
    found.Reload()
    assert sorted(found.Tags()["scalars"]) == ["bytes_up", "loss", "round"]
    assert [(e.step, e.value) for e in found.Scalars("loss")] == list(enumerate(LOSSES))
    assert [e.value for e in found.Scalars("bytes_up")] == [1000.0, 1001.0, 1002.0]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    config, folder = run_of(tmp_path / "runs", "mlflow")
    tell(config, folder)
    client = MlflowClient(f"sqlite:///{folder.path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("logged")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == folder.path.name
    assert run.info.status == "FINISHED"
    assert run.data.params == {"adapter": "lora", "base": "fedtune:tiny"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == list(enumerate(LOSSES))
    assert run.data.metrics["bytes_up"] == 1002.0
    assert [p.name for p in tmp_path.iterdir()] == ["runs"], "wrote outside of the run folder"


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config, folder = run_of(tmp_path, "wandb")
    tell(config, folder)
    (store,) = (folder.path / "wandb").glob("offline-run-*/run-*.wandb")
    wanted = (b"bytes_up", b"loss", b"1.25", b"1002", folder.path.name.encode())
    end = time.monotonic() + 20  # a process of wandb's own writes the file
    while missing := [one for one in wanted if one not in store.read_bytes()]:
        assert time.monotonic() < end, f"{missing} not in {store.stat().st_size} bytes"
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, folder = run_of(tmp_path, name)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted: None if wanted == name else real(wanted)
    )
    match = f"output.loggers names '{name}', which is not installed"
    with pytest.raises(FedtuneError, match=match) as caught, open_loggers(config, folder):
        pass
    assert caught.value.code == ExitCode.CONFIG
    assert caught.value.hint == (f"pip install 'fedtune[{name}]', or remove it from output.loggers")

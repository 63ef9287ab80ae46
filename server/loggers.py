"""Metrics to TensorBoard, MLflow or Weights & Biases, by name; each is an optional extra."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.events import Event, RoundDone, Watcher
from fedtune.server.run_folder import RunFolder

__all__ = ["open_loggers", "require_loggers"]

_Write = Callable[[int, dict[str, float]], None]
_MODULES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}


@contextmanager
def open_loggers(config: Config, folder: RunFolder) -> Iterator[Watcher]:
    """Open the loggers of an experiment; yields a watcher that feeds them.

    Raises
    ------
    FedtuneError
        A logger is named whose package is not installed.
    """
    require_loggers(config)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(_OPENERS[name](config, folder)) for name in config.output.loggers
        ]

        def hear(event: Event) -> None:
            if isinstance(event, RoundDone):
                numbers = {k: float(v) for k, v in event.row.items() if isinstance(v, int | float)}
                for write in writers:
                    write(event.round, numbers)

        yield hear


def require_loggers(config: Config) -> None:
    """Refuse loggers whose package is not installed, before anything is made for them."""
    for name in config.output.loggers:
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise FedtuneError(
                f"output.loggers names '{name}', which is not installed",
                hint=f"pip install 'fedtune[{name}]', or remove it from output.loggers",
                code=ExitCode.CONFIG,
            )


@contextmanager
def _tensorboard(config: Config, folder: RunFolder) -> Iterator[_Write]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder.path / "tensorboard"))

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    try:
        yield write
    finally:
        writer.close()


@contextmanager
def _mlflow(config: Config, folder: RunFolder) -> Iterator[_Write]:
    """Log to ``MLFLOW_TRACKING_URI``, or to a database file in the run folder."""
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{(folder.path / 'mlflow.db').resolve()}")
    mlflow.set_experiment(config.name)
    with mlflow.start_run(run_name=folder.path.name):
        mlflow.log_params({"adapter": config.tuning.adapter, "base": config.model.base})

        def write(step: int, numbers: dict[str, float]) -> None:
            mlflow.log_metrics(numbers, step=step)

        yield write


@contextmanager
def _wandb(config: Config, folder: RunFolder) -> Iterator[_Write]:
    import wandb

    run: Any = wandb.init(
        project="fedtune", name=folder.path.name, dir=str(folder.path),
        config=config.model_dump(mode="json", by_alias=True),
    )  # fmt: skip
    try:
        yield lambda step, numbers: run.log(numbers, step=step)
    finally:
        run.finish()


_OPENERS: dict[str, Callable[..., Any]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}

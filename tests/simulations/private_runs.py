"""What the tests of private runs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedtune.config import Config
from fedtune.server.run_folder import RunFolder
from tests.simulations.apps import settings

EXAMPLE: dict[str, Any] = {
    "relation": "add-or-remove-one", "population": 12, "delta": 1e-3, "noise_multiplier": 1.0,
}  # fmt: skip
CLIENT: dict[str, Any] = {
    "relation": "add-or-remove-one", "population": 4, "delta": 1e-3, "noise_multiplier": 1.0,
}  # fmt: skip


def private(folder: Path, shared: Path, **changes: Any) -> Config:
    """A small experiment that may promise something; ``changes`` are ``table__key=value``."""
    base: dict[str, Any] = {
        "data__holdout": 0.0, "data__pack": False, "data__max_length": 16, "tuning__steps": 2,
        "federation__weighting": "uniform", "evaluation__clients": 0,
        "privacy": {
            "insecure_seeded_noise": True, "dataset": "stories",
            "ledger": str(folder / "ledger.db"),
        },
    }  # fmt: skip
    return settings(folder, shared, **(base | changes))


def example_run(folder: Path, shared: Path, **changes: Any) -> Config:
    return private(folder, shared, **({"privacy__example": EXAMPLE} | changes))


def client_run(folder: Path, shared: Path, **changes: Any) -> Config:
    return private(
        folder, shared, **({"privacy__client": CLIENT, "federation__cohort": 0.5} | changes)
    )


def privacy_json(folder: RunFolder) -> dict[str, Any]:
    return dict(json.loads((folder.adapter / "privacy.json").read_text()))

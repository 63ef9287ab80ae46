"""What tests of several folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.needed import lacking

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that take long: at the end one worker would wait for another."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real data sets and models; CI must have it."""
    folder = Path(os.environ.get("FEDTUNE_SHARED", ROOT.parent / "shared")).resolve()
    if not folder.is_dir():
        lacking(f"FEDTUNE_SHARED='{folder}' does not exist: set it to the shared folder")
    return folder

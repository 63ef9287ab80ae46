"""What tests of several folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.needed import lacking

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real data sets and models; CI must have it."""
    folder = Path(os.environ.get("FEDTUNE_SHARED", ROOT.parent / "shared")).resolve()
    if not folder.is_dir():
        lacking(f"FEDTUNE_SHARED='{folder}' does not exist: set it to the shared folder")
    return folder

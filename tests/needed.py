"""What tests need of the machine: skipped where it lacks, and failed where CI says it is there."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

__all__ = ["lacking", "need_program"]


def lacking(problem: str) -> NoReturn:
    """Skip the test; under CI, which has everything, fail it."""
    if os.environ.get("CI"):
        pytest.fail(problem)
    pytest.skip(problem)


def need_program(name: str) -> None:
    """Go on where a program is on this machine."""
    if shutil.which(name) is None:
        lacking(f"no {name} on this machine")

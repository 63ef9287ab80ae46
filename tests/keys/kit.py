"""A federation in a folder, and how often to fuzz."""

from __future__ import annotations

import datetime as dt
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings

from fedtune.errors import ExitCode, FedtuneError
from fedtune.keys.authority import make_authority, make_server
from fedtune.keys.node import Public, new_identity, public_of

T = TypeVar("T")
EXAMPLES = int(os.environ.get("FEDTUNE_FUZZ", "200"))
"""Of each fuzz test; FEDTUNE_FUZZ=100000 for a long night."""
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 1000,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NOW = dt.datetime.now(dt.UTC)


def federation(folder: Path, name: str = "study", **settings: Any) -> Path:
    make_authority(folder, name)
    make_server(folder, ["localhost", "127.0.0.1"], **settings)
    return folder


def public(name: str) -> Public:
    return public_of(new_identity(name))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def attempt(what: Callable[[], T]) -> T | FedtuneError:
    """Run a decoder on anything: a value, or an error for people that is short and has a code."""
    try:
        return what()
    except FedtuneError as found:
        error = found
    assert error.code == ExitCode.SIGNATURE
    assert len(str(error)) < 400
    assert error.hint
    return error


def fails(
    what: Callable[[], object], words: str, code: ExitCode = ExitCode.SIGNATURE
) -> FedtuneError:
    """Run what must be refused, and return how."""
    with pytest.raises(FedtuneError, match=words) as caught:
        what()
    assert caught.value.code == code
    assert caught.value.hint
    return caught.value

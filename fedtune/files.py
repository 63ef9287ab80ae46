"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["read_tensors", "storage", "write_atomic", "write_json"]


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise FedtuneError(
            f"cannot write '{path}': {error.strerror or error}",
            hint="free some space or choose another output.folder; then: "
            "fedtune simulate FILE --resume RUN",
            code=ExitCode.STORAGE,
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, durable before it returns.

    Raises
    ------
    FedtuneError
        With ``ExitCode.STORAGE`` when the disk is full or refuses; ``path`` is
        then what it was before.
    """
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write readable JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a safetensors file: arrays by name, and its metadata."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise FedtuneError(
            f"'{path}' cannot be read: {error}",
            hint="remove it to fall back to the one before",
            code=ExitCode.STORAGE,
        ) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

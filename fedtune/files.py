"""Writing files so that a crash leaves the old one or the new one; and keeping others out."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from safetensors import SafetensorError, safe_open

from fedtune.errors import ExitCode, FedtuneError

__all__ = [
    "Fresh",
    "append",
    "numbered",
    "numbered_name",
    "read_tensors",
    "same_text",
    "storage",
    "try_lock",
    "write_atomic",
    "write_json",
]

_Value = TypeVar("_Value")


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


def append(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Add ``data`` to a file's end, durable before it returns.

    Parameters
    ----------
    path : Path
        Made if it is not there, with the permissions ``mode`` less the umask.
    data : bytes
    mode : int

    Raises
    ------
    FedtuneError
        With ``ExitCode.STORAGE`` when the disk is full or refuses; part of ``data`` may
        be there then.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with storage(path), os.fdopen(os.open(path, flags, mode), "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def try_lock(file: IO[Any] | int) -> bool:
    """Lock an open file (or its handle) against other processes; say whether it was free.

    The lock lasts until the file is closed, or its process ends, however it ends.

    Raises
    ------
    OSError
        The file system knows no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass
class Fresh(Generic[_Value]):
    """What a file says, read again when the file is another one, or of another time or length.

    Parameters
    ----------
    path : Path
    read : callable
        Reads and checks the file. What it raises is raised each time anew.
    """

    path: Path
    read: Callable[[], _Value]
    _stamp: tuple[int, int, int] | None = None
    _found: list[_Value] = field(default_factory=list, repr=False)

    def now(self) -> _Value:
        """Return what the file says now: the same object while it has not changed."""
        try:
            facts = self.path.stat()
        except OSError:
            self._stamp = None
            # It says in its own words that the file is not there.
            return self.read()
        # Taken before reading: what changes meanwhile is read again.
        stamp = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
        if stamp != self._stamp:
            self._found, self._stamp = [self.read()], stamp
        return self._found[0]


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


def numbered_name(prefix: str, number: int) -> str:
    """Return the name of a file of tensors that is kept by round.

    >>> numbered_name("round", 7)
    'round-000007.safetensors'
    """
    return f"{prefix}-{number:06d}.safetensors"


def numbered(folder: Path, prefix: str) -> dict[int, Path]:
    """Return the files that `numbered_name` named, by number, in order."""
    names = ((re.fullmatch(rf"{prefix}-(\d+)\.safetensors", p.name), p) for p in folder.glob("*"))
    return dict(sorted((int(match[1]), path) for match, path in names if match))


def same_text(public: str, private: str) -> bool:
    """Say whether two names are of one text, one inside the other, or one data set of a hub.

    Examples
    --------
    >>> same_text("./notes.jsonl", "notes.jsonl"), same_text("hub:x:plain", "hub:x")
    (True, True)
    >>> same_text("public.jsonl", "notes.jsonl")
    False
    """
    if ":" in public or ":" in private:
        return public.split(":")[:2] == private.split(":")[:2]
    one, two = (Path(name).expanduser().resolve() for name in (public, private))
    if one.exists() and two.exists() and one.samefile(two):
        return True
    return one.is_relative_to(two) or two.is_relative_to(one)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

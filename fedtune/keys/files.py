"""Files that hold keys: made once, whole, for their owner alone; never overwritten."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import try_lock, write_atomic

__all__ = [
    "absent",
    "locked",
    "place",
    "private_folder",
    "read_bytes",
    "read_private",
    "refused",
    "replace",
    "wrong",
]

MOST_KEY_BYTES = 1 << 16
"""A key, a certificate or a line is far smaller than this."""
PATIENCE = 10.0
"""Seconds that a command waits for another one that changes the same folder."""


def refused(message: str, hint: str) -> FedtuneError:
    """Return the error of a key, a certificate or a roster that will not do."""
    return FedtuneError(message, hint=hint, code=ExitCode.SIGNATURE)


def wrong(message: str, hint: str) -> FedtuneError:
    """Return the error of a name, a host or a place that will not do."""
    return FedtuneError(message, hint=hint, code=ExitCode.CONFIG)


def place(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put a new file in place, whole and durable.

    Parameters
    ----------
    path : Path
        Where nothing may be yet, not even a broken link; links are not followed.
    data : bytes
    mode : int
        Its permissions, whatever the umask.

    Raises
    ------
    FedtuneError
        ``CONFIG`` when something is there, ``STORAGE`` when the disk refuses; nothing is
        left behind then.
    """
    with _disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made for its owner alone, and whole before it has its name.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(name, path)
            except FileExistsError:
                raise _there(path) from None
        finally:
            Path(name).unlink(missing_ok=True)


def absent(*paths: Path) -> None:
    """Raise when something is at one of these places, a broken link too.

    Raises
    ------
    FedtuneError
        ``CONFIG``, with the place.
    """
    for path in paths:
        if os.path.lexists(path):
            raise _there(path)


def replace(path: Path, data: bytes) -> None:
    """Put the next version of a public file in place, atomically.

    Raises
    ------
    FedtuneError
        ``STORAGE`` when the disk refuses; the file is then what it was.
    """
    try:
        write_atomic(path, data)
    except FedtuneError as error:
        hint = "free some space, check the folder's permissions; nothing was changed"
        raise FedtuneError(str(error), hint=hint, code=error.code) from error
    with _disk(path):
        path.chmod(0o644)


def read_bytes(path: Path, hint: str, most: int = MOST_KEY_BYTES) -> bytes:
    """Read a small file.

    Parameters
    ----------
    path : Path
    hint : str
        What to do when it is not there.
    most : int
        Most bytes.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: missing, not readable, not a file, or too long.
    """
    return _read(path, hint, most)[0]


def read_private(path: Path, hint: str) -> bytes:
    """Read a file that nobody but its owner may read.

    Raises
    ------
    FedtuneError
        ``SIGNATURE``: as :func:`read_bytes`, or its mode lets others in.
    """
    data, mode = _read(path, hint, MOST_KEY_BYTES)
    if mode & 0o077:
        raise refused(
            f"key '{path}' is open to others (mode {mode:04o})",
            f"chmod 600 {path} (if others have seen it, make a new one)",
        )
    return data


def private_folder(folder: Path) -> None:
    """Make a folder that is its owner's alone (0700), or make an empty one so.

    Raises
    ------
    FedtuneError
        ``CONFIG`` when it holds other things and is open to others; ``STORAGE``.
    """
    with _disk(folder):
        if folder.exists() and not folder.is_dir():
            raise wrong(f"'{folder}' is no folder", "choose another --folder")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        mode = stat.S_IMODE(folder.stat().st_mode)
        if mode == 0o700:
            return
        # What lies there is somebody's: who sees it is not for this command to change.
        if mode & 0o077 and any(folder.iterdir()):
            raise wrong(
                f"'{folder}' is open to others (mode {mode:04o}) and not empty",
                f"choose a new --folder, or: chmod 700 {folder}",
            )
        folder.chmod(0o700)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time change what is in a folder.

    Raises
    ------
    FedtuneError
        ``STORAGE`` when another holds it for more than ten seconds.
    """
    path = folder / ".lock"
    with _disk(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.fchmod(handle, 0o600)
    try:
        until = time.monotonic() + PATIENCE
        while not try_lock(handle):
            if time.monotonic() > until:
                raise FedtuneError(
                    f"'{folder}' is being changed by another command",
                    hint="try again when it has ended",
                    code=ExitCode.STORAGE,
                )
            time.sleep(0.02)
        yield
    finally:
        os.close(handle)


def _read(path: Path, hint: str, most: int) -> tuple[bytes, int]:
    try:
        # Without waiting: a pipe in a file's place must not hold anybody up.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode):
                raise refused(f"'{path}' is no file", hint)
            data = file.read(most + 1)
    except FileNotFoundError:
        raise refused(f"'{path}' is not there", hint) from None
    except (OSError, ValueError) as error:
        words = error.strerror if isinstance(error, OSError) else error
        raise refused(f"'{path}' cannot be read: {words or error}", hint) from error
    if len(data) > most:
        raise refused(f"'{path}' has more than {most} bytes", hint)
    return data, stat.S_IMODE(facts.st_mode)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FedtuneError(
            f"cannot write '{path}': {error.strerror or error}",
            hint="free some space, check permissions, or choose another folder",
            code=ExitCode.STORAGE,
        ) from error


def _there(path: Path) -> FedtuneError:
    return wrong(
        f"'{path}' is there already", "nothing is overwritten: choose another name or folder"
    )

"""What failed at a client, in full, for its owner alone: the words may quote rows."""

from __future__ import annotations

import contextlib
import os
import traceback
from pathlib import Path

__all__ = ["log_failure"]


def log_failure(file: Path, error: BaseException) -> None:
    """Append a traceback to a file that only its owner can read; a full disk is no failure."""
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with os.fdopen(os.open(file, flags, 0o600), "a", encoding="utf-8") as log:
            log.write(text)

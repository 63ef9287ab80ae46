"""The one exception of fedtune, and the exit codes of its command.

An error names the thing, shows the value and says what to do about it. Exit
codes are part of the interface: they are listed in ``docs/exit-codes.md`` and
never change their meaning.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["ExitCode", "FedtuneError"]


class ExitCode(IntEnum):
    """Exit status of the ``fedtune`` command. Numbers are stable."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    CONFIG = 10
    DATA = 11
    MODEL = 12
    RUN_FOLDER = 13
    RESUME_REFUSED = 14
    QUORUM = 20
    ENGINE = 21
    STORAGE = 22
    ADAPTER_MISMATCH = 23
    BUDGET_EXHAUSTED = 30
    PRIVACY = 31
    LEDGER = 32
    SIGNATURE = 33
    INTERRUPTED = 130


class FedtuneError(Exception):
    """A failure that a person can act on.

    Parameters
    ----------
    message : str
        What is wrong: the name and the value.
    hint : str
        What to do about it. May be empty.
    code : ExitCode
        The exit status of the command that meets it.

    Examples
    --------
    >>> error = FedtuneError("rounds=0", hint="use at least 1", code=ExitCode.CONFIG)
    >>> str(error), error.hint, int(error.code)
    ('rounds=0', 'use at least 1', 10)
    """

    def __init__(self, message: str, *, hint: str = "", code: ExitCode = ExitCode.INTERNAL) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        """Keep hint and code when an engine carries the error between processes."""
        return (_rebuild, (str(self), self.hint, int(self.code)))


def _rebuild(message: str, hint: str, code: int) -> FedtuneError:
    return FedtuneError(message, hint=hint, code=ExitCode(code))

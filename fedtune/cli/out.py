"""What the command says: results on stdout, words for people on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from rich.console import Console

from fedtune.errors import ExitCode, FedtuneError

__all__ = ["ENVELOPE", "Out", "reporting"]

ENVELOPE = 1
"""Version of the JSON envelope: ``{"schema", "command", "ok", "result" | "error"}``."""


class Out:
    """One command's way to speak.

    Parameters
    ----------
    command : str
        Its name, for the envelope.
    as_json : bool
        One JSON envelope on stdout instead of text.
    """

    def __init__(self, command: str, as_json: bool) -> None:
        self.command = command
        self.as_json = as_json
        self.people = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """Tell people something; never part of the result."""
        self.people.print(text, markup=False, soft_wrap=True)

    def result(self, value: Mapping[str, Any], text: str = "") -> None:
        """Give the result: as an envelope, or ``text`` for people."""
        if self.as_json:
            self._envelope(ok=True, result=value)
        elif text:
            Console(highlight=False).print(text, soft_wrap=True, markup=False)

    def failure(self, error: FedtuneError) -> ExitCode:
        """Report an error and return the exit status."""
        if self.as_json:
            name = error.code.name.lower()
            self._envelope(
                ok=False,
                error={
                    "code": int(error.code), "name": name,
                    "message": str(error), "hint": error.hint,
                },
            )  # fmt: skip
        self.people.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        if error.hint:
            self.people.print(f"hint:  {error.hint}", markup=False, soft_wrap=True)
        return error.code

    def _envelope(self, **content: Any) -> None:
        envelope = {"schema": ENVELOPE, "command": self.command} | content
        sys.stdout.write(json.dumps(envelope, allow_nan=False, default=str) + "\n")


@contextlib.contextmanager
def reporting(out: Out) -> Iterator[Out]:
    """Turn errors into words and an exit status."""
    try:
        yield out
    except FedtuneError as error:
        raise typer.Exit(out.failure(error)) from None
    except KeyboardInterrupt:
        hint = "go on with: fedtune simulate --resume latest" if out.command == "simulate" else ""
        stopped = FedtuneError("stopped", hint=hint, code=ExitCode.INTERRUPTED)
        raise typer.Exit(out.failure(stopped)) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.OK) from None

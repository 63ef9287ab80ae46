"""The node's own log of what left: one line for each message, before it leaves.

``sent.jsonl`` is for people and for auditors: when, to what question, how many bytes, and
what it was in plain words. A message that cannot be written down does not leave.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedtune.errors import FedtuneError
from fedtune.files import append
from fedtune.wire import (
    KINDS,
    WITHHELD,
    Accepted,
    Advert,
    Dealt,
    Evaluation,
    Hello,
    Revealed,
    Share,
    Signed,
    Update,
    from_record,
)

__all__ = ["SentLog", "words_of"]

_PLAIN = {
    KINDS[Accepted]: "agreed to the experiment's terms",
    KINDS[Hello]: "name, model fingerprint, number of rows where no privacy is promised",
    KINDS[Share]: "this node's part of the seed pool's key",
    KINDS[Advert]: "public keys for one secure sum",
    KINDS[Dealt]: "encrypted shares for the other members of a secure sum",
    KINDS[Signed]: "a signature of who survived",
    KINDS[Revealed]: "shares that take the masks off a secure sum",
    KINDS[Evaluation]: "counts of right and wrong answers on held-out rows",
}


@dataclass(frozen=True)
class SentLog:
    """Appends to a file that only the owner can read."""

    path: Path

    def write(self, kind: str, reply: Message, size: int, job: str) -> None:
        """Write down one message; durable when it returns.

        Raises
        ------
        FedtuneError
            ``ExitCode.STORAGE``: the disk is full or not there. The message must not leave.
        """
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "job": job,
            "asked": kind, "bytes": size, "what": words_of(kind, reply),
        }  # fmt: skip
        append(self.path, (json.dumps(line) + "\n").encode(), 0o600)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield every whole line, oldest first."""
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    yield dict(json.loads(line))
                except ValueError:
                    continue


def words_of(kind: str, reply: Message) -> str:
    """Return in plain words what a reply holds."""
    if reply.has_error():
        return f"a refusal: {reply.error.reason}"
    if kind != KINDS[Update]:
        return _PLAIN.get(kind, "an answer")
    try:
        update = from_record(Update, reply.content)
    except FedtuneError:
        return "an answer"
    numbers = sum(value.size for value in update.tensors.values())
    tensors = "1 tensor" if len(update.tensors) == 1 else f"{len(update.tensors)} tensors"
    masked = set(update.tensors) == {"values", "signature"}
    what = "a masked update" if masked else "an update"
    facts = "" if update.loss == WITHHELD else (
        f"; loss {update.loss:.4g}, {update.examples} examples, {update.steps} steps"
    )  # fmt: skip
    return f"round {update.round}: {what}, {tensors} of {numbers:,} numbers{facts}"

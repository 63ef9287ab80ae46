"""What a node remembers of its messages: the last answers, and its place at the server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode

from fedtune.client.fleet_door import Door
from fedtune.client.fleet_objects import Parcel
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import try_lock

__all__ = ["Answers", "Memo", "lost_work", "open_memo"]

_MOST_BYTES = 64 * 2**20
_MOST_NAMES = 4096
_NUMBERS = ("run_id", "src_node_id", "dst_node_id")
_TEXTS = ("message_id", "group_id", "message_type")
_TIMES = ("created_at", "ttl")


@dataclass
class Answers:
    """The last answers by the id of their question: a question asked twice is not computed twice.

    The newest is kept whatever its size, older ones up to 64 MiB together; of those
    before it is known only that they were answered.
    """

    _parcels: OrderedDict[str, Parcel] = field(default_factory=OrderedDict)
    _names: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def keep(self, question: str, answer: Parcel) -> None:
        """Remember an answer."""
        self._names[question] = None
        self._parcels[question] = answer
        while len(self._names) > _MOST_NAMES:
            self._names.popitem(last=False)
        total = sum(one.bytes for one in self._parcels.values())
        while len(self._parcels) > 1 and total > _MOST_BYTES:
            total -= self._parcels.popitem(last=False)[1].bytes

    def find(self, question: str) -> Parcel | None:
        """Return the answer, if it is still here."""
        return self._parcels.get(question)

    def had(self, question: str) -> bool:
        """Return whether the question was answered before."""
        return question in self._names


@dataclass
class Memo:
    """The node's place at one server, in a file that may be lost without harm."""

    path: Path | None
    place: str
    node: int = 0
    at_work: dict[str, Any] | None = None

    def settle(self, node: int) -> None:
        """Remember our id at the server."""
        if node != self.node:
            self.node = node
            self._write()

    def begin(self, question: Message) -> None:
        """Remember the message at work."""
        meta = question.metadata
        names = (*_NUMBERS, *_TEXTS, *_TIMES)
        self.at_work = {name: getattr(meta, name) for name in names}
        self._write()

    def end(self) -> None:
        """Forget the message at work: it was answered, or given up."""
        if self.at_work is not None:
            self.at_work = None
            self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        value = {"place": self.place, "node": self.node, "at_work": self.at_work}
        draft = self.path.with_name(f".{self.path.name}.new")
        # A full disk costs a quick return after a crash, nothing else.
        with contextlib.suppress(OSError):
            draft.write_text(json.dumps(value), encoding="utf-8")
            os.replace(draft, self.path)


@contextlib.contextmanager
def open_memo(door: Door) -> Iterator[Memo]:
    """Read the node's memo and keep every other process from using it meanwhile.

    Raises
    ------
    FedtuneError
        Another process of this machine is this node.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = door.login.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    place = hashlib.sha256(door.address.encode() + b"\0" + door.root + b"\0" + key).hexdigest()
    if door.memo is None:
        yield Memo(None, place)
        return
    try:
        door.memo.parent.mkdir(parents=True, exist_ok=True)
        lock = door.memo.with_name(f".{door.memo.name}.lock").open("w")
        free = try_lock(lock)
    except OSError as error:
        raise FedtuneError(
            f"'{door.memo}' cannot be written: {error.strerror or error}",
            hint="choose another folder for the node's state",
            code=ExitCode.STORAGE,
        ) from error
    with lock:
        if not free:
            raise FedtuneError(
                "another process on this machine is this node already",
                hint="stop it first, or make this one a key and a folder of its own",
                code=ExitCode.ENGINE,
            )
        yield _read(door.memo, place)


def lost_work(memo: Memo) -> tuple[str, Message] | None:
    """Return the answer to the message at work when the process died: an error, or nothing."""
    if memo.at_work is None:
        return None
    meta = Metadata(**memo.at_work, reply_to_message_id="")
    question = make_message(metadata=meta, content=RecordDict())
    error = Error(ErrorCode.CLIENT_APP_CRASHED, "the node died while it worked on this")
    return meta.message_id, Message(error, reply_to=question)


def _read(path: Path, place: str) -> Memo:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["place"] != place or type(found["node"]) is not int or found["node"] < 0:
            return Memo(path, place)
        return Memo(path, place, found["node"], _work(found["at_work"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return Memo(path, place)


def _work(found: Any) -> dict[str, Any] | None:
    """Check the metadata of the message at work."""
    kinds = dict.fromkeys(_NUMBERS, int) | dict.fromkeys(_TEXTS, str) | dict.fromkeys(_TIMES, float)
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        return None
    return found if all(type(found[name]) is kind for name, kind in kinds.items()) else None

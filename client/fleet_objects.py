"""Messages as they travel in Flower: a tree of objects, each named by the hash of its bytes.

The server is not trusted here. Before anything is fetched the tree's size and depth are
checked; what arrives must have the hash that it was asked by, and may name no other
objects than the tree does; and the arrays it describes must fit the limit once put
together. What is inflated are records of numbers, text and bytes: nothing that runs.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedtune.client.fleet_line import MOST_OBJECT, Line
from fedtune.errors import ExitCode, FedtuneError

__all__ = ["Parcel", "deflate", "fetch", "inflate", "plan", "send"]

_MOST_OBJECTS = 2048
_MOST_PLAIN = 4 * 2**20
_KINDS = ("Message", "RecordDict", "records", "Array", "ArrayChunk")
_RECORDS = ("ArrayRecord", "ConfigRecord", "MetricRecord")
_AHEAD = 2
_LEAST_PAUSE, _MOST_PAUSE = 0.01, 0.5
_HEX = frozenset("0123456789abcdef")


@dataclass
class Upload:
    """How far the sending of an answer has come: the server's name for it, and what it lacks."""

    session: str = ""
    lacking: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Parcel:
    """An answer, ready to go: what announces it, and its objects, children first."""

    request: PushMessagesRequest
    run: int
    message: str
    objects: dict[str, Callable[[], bytes]]
    bytes: int
    until: float
    upload: Upload = field(default_factory=Upload, compare=False)


def plan(tree: ObjectTree) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Check a message's tree; return each object's depth and children, children first.

    Raises
    ------
    FedtuneError
        Too many objects, too deep, or a name that is no SHA-256.
    """
    wanted: dict[str, tuple[int, tuple[str, ...]]] = {}
    waiting = [(tree, 0, False)]
    seen = 0
    while waiting:
        node, depth, done = waiting.pop()
        name = node.object_id
        if done:
            found = (depth, tuple(sorted(child.object_id for child in node.children)))
            if wanted.setdefault(name, found) != found:
                raise _refused("one object stands at two places in it")
            continue
        seen += 1
        if seen > _MOST_OBJECTS:
            raise _refused(f"it has more than {_MOST_OBJECTS} objects")
        if depth >= len(_KINDS):
            raise _refused(f"it is more than {len(_KINDS)} levels deep")
        if len(name) != 64 or not _HEX.issuperset(name):
            raise _refused("the name of an object is not a SHA-256")
        waiting.append((node, depth, True))
        waiting += [(child, depth + 1, False) for child in node.children]
    return wanted


def fetch(
    line: Line,
    run: int,
    wanted: dict[str, tuple[int, tuple[str, ...]]],
    most_bytes: int,
    until: float,
    stop: threading.Event,
) -> dict[str, bytes]:
    """Get all objects of a message, a few at a time.

    Parameters
    ----------
    until : float
        Unix time after which the message is of no use.

    Raises
    ------
    FedtuneError
        An object is not there, is not what its name says, or is too much.
    grpc.RpcError
        The line broke.
    """
    found: dict[str, bytes] = {}
    total = plain = 0
    for name, content in _pulled(line, run, wanted, until, stop):
        depth, children = wanted[name]
        total += len(content)
        if total > most_bytes:
            raise _refused(f"it is larger than {most_bytes:,} bytes")
        if hashlib.sha256(content).hexdigest() != name:
            raise _refused("an object is not what its name says: it was changed on the way")
        if _kind(content, children) not in _allowed(depth):
            raise _refused("an object is of a kind that does not belong there")
        if _KINDS[depth] != "ArrayChunk":
            plain += len(content)
            if plain > _MOST_PLAIN:
                raise _refused(f"its fields are larger than {_MOST_PLAIN:,} bytes")
        found[name] = content
    return found


def inflate(
    root: str,
    contents: dict[str, bytes],
    wanted: dict[str, tuple[int, tuple[str, ...]]],
    most_bytes: int,
) -> Message:
    """Put a message together; ``contents`` is used up.

    Raises
    ------
    FedtuneError
        It cannot be decoded, or its arrays are larger than ``most_bytes`` once put together.
    """
    try:
        whole = sum(
            _whole(contents, name, children)
            for name, (depth, children) in wanted.items()
            if _KINDS[depth] == "Array"
        )
        if whole > most_bytes:
            raise _refused(f"its arrays are larger than {most_bytes:,} bytes")
        message = inflate_object_from_contents(root, contents)
    except FedtuneError:
        raise
    except Exception as error:  # Flower's decoders raise whatever they meet
        raise _refused(f"it cannot be decoded ({type(error).__name__})") from error
    if not isinstance(message, Message):
        raise _refused("it is not a message")
    message.metadata.__dict__["_message_id"] = root
    return message


def deflate(answer: Message, seconds: float, most_bytes: int) -> Parcel:
    """Take an answer apart for sending.

    Raises
    ------
    FedtuneError
        It is larger than ``most_bytes``.
    """
    with no_object_id_recompute():
        name = answer.object_id
        answer.metadata.__dict__["_message_id"] = name
        objects = get_all_nested_objects(answer)
        tree = get_object_tree(answer)
    total = 0
    contents: dict[str, Callable[[], bytes]] = {}
    for one, thing in objects.items():
        data = getattr(thing, "data", None) if type(thing).__name__ == "ArrayChunk" else None
        if data is None:
            content = thing.deflate()
            total += len(content)
            contents[one] = _given(content)
        else:
            # A chunk's bytes are those of the array: copied only when they are sent.
            total += len(data) + len(f"ArrayChunk  {len(data)}") + 1
            contents[one] = thing.deflate
    if total > most_bytes:
        raise FedtuneError(
            f"the answer has {total:,} bytes, and {most_bytes:,} are allowed",
            hint="raise the owner's limit on the size of messages",
            code=ExitCode.ENGINE,
        )
    light = remove_content_from_message(answer) if answer.has_content() else answer
    request = PushMessagesRequest(
        node=Node(),
        messages_list=[message_to_proto(light)],
        message_object_trees=[tree],
        clientapp_runtime_list=[seconds],
    )
    meta = answer.metadata
    return Parcel(request, meta.run_id, name, contents, total, meta.created_at + meta.ttl)


def send(line: Line, parcel: Parcel, *, again: bool = False) -> int | None:
    """Announce an answer and send those of its objects that the server lacks.

    Parameters
    ----------
    again : bool
        It may be there already, in part or whole: an earlier call broke.

    Returns
    -------
    int or None
        Bytes of the objects that went; None if the server no longer waits for this.

    Raises
    ------
    FedtuneError
        It did not keep an object: its patience for an upload was over. Call again.
    grpc.RpcError
        The line broke: call again, with a new line.
    """
    sent = 0
    if parcel.upload.lacking:
        # The ServerApp may have taken the announcement and wait for the rest: Flower then
        # knows no such answer any more, but the upload goes on for 180 s. What is not stored
        # now was stored before, or is asked for again below.
        sent = _upload(line, parcel, strict=False)
    parcel.request.node.node_id = line.node
    reply = line.push(parcel.request)
    parcel.upload.session = reply.session_id
    parcel.upload.lacking = set(reply.objects_to_push)
    if parcel.message not in parcel.upload.lacking and not again:
        return None
    return sent + _upload(line, parcel, strict=True)


def _upload(line: Line, parcel: Parcel, *, strict: bool) -> int:
    """Send what the server lacks; return its bytes."""
    upload, sent = parcel.upload, 0
    going: deque[tuple[str, Callable[[], Any]]] = deque()

    def settle() -> None:
        name, wait = going.popleft()
        response = wait()
        if strict:
            _stored(response)
        upload.lacking.discard(name)

    for name, content in parcel.objects.items():
        if name not in upload.lacking:
            continue
        while len(going) >= _AHEAD:
            settle()
        data = content()
        sent += len(data)
        going.append((name, line.push_object_soon(parcel.run, upload.session, name, data)))
    while going:
        settle()
    return sent


def _pulled(
    line: Line,
    run: int,
    wanted: dict[str, tuple[int, tuple[str, ...]]],
    until: float,
    stop: threading.Event,
) -> Iterator[tuple[str, bytes]]:
    names = deque(wanted)
    going: deque[tuple[str, Callable[[], Any]]] = deque()
    pause = _LEAST_PAUSE
    while names or going:
        while names and len(going) < _AHEAD:
            name = names.popleft()
            going.append((name, line.object_soon(run, name)))
        name, wait = going.popleft()
        response = wait()
        if not response.object_found:
            raise _refused("an object is not at the server")
        if response.object_available:
            pause = _LEAST_PAUSE
            yield name, response.object_content
            continue
        # The server is still receiving it: objects are announced before they are there.
        names.appendleft(name)
        if time.time() > until:
            raise _refused("its time was over before all of it was at the server")
        if stop.wait(pause * random.uniform(0.8, 1.2)):
            raise _refused("the node is stopping")
        pause = min(pause * 2, _MOST_PAUSE)


def _allowed(depth: int) -> tuple[str, ...]:
    return _RECORDS if _KINDS[depth] == "records" else (_KINDS[depth],)


def _kind(content: bytes, children: tuple[str, ...]) -> str:
    """Return what an object says it is, having checked that it names the tree's children."""
    end = content.find(b"\0", 0, MOST_OBJECT)
    try:
        kind, named, length = get_object_head_values_from_object_content(content)
    except (ValueError, UnicodeDecodeError) as error:
        raise _refused("an object has no head") from error
    if end < 0 or len(content) - end - 1 != length:
        raise _refused("an object is not as long as it says")
    if tuple(sorted(named)) != children:
        raise _refused("an object names other objects than the message's tree")
    return kind


def _whole(contents: dict[str, bytes], name: str, children: tuple[str, ...]) -> int:
    """Return the bytes of an array put together: a chunk may stand in it many times."""
    content = contents[name]
    _, named, _ = get_object_head_values_from_object_content(content)
    body = json.loads(content[content.index(b"\0") + 1 :])
    lengths = [len(contents[one]) for one in named]
    return sum(lengths[index] for index in body["arraychunk_ids"])


def _given(content: bytes) -> Callable[[], bytes]:
    return lambda: content


def _stored(response: Any) -> None:
    if not response.stored:
        raise FedtuneError("the server no longer takes this answer", code=ExitCode.ENGINE)


def _refused(why: str) -> FedtuneError:
    return FedtuneError(f"the message was refused: {why}", code=ExitCode.ENGINE)

# ruff: noqa: N802 - gRPC names its methods
"""A server that lies: whatever it sends, the node refuses it in words and stays."""

from __future__ import annotations

import hashlib
import json
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, fleet_pb2_grpc
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectResponse,
    PushObjectResponse,
)
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedtune.client.fleet import Door
from fedtune.client.fleet_objects import fetch, inflate, plan
from fedtune.errors import FedtuneError
from fedtune.simulations.benchmarks.node_server import free_ports, make_certificates
from tests.client.fleet_kit import Joined, echo, joined, new_key

NODE = 77


class Packed:
    """A message as a server holds it: announcement, tree and objects, all open to change."""

    def __init__(self, content: RecordDict, node: int = NODE, ttl: float = 30.0) -> None:
        meta = Metadata(
            run_id=5, message_id="", src_node_id=1, dst_node_id=node, reply_to_message_id="",
            group_id="1", created_at=time.time(), ttl=ttl, message_type="train",
        )  # fmt: skip
        message = make_message(metadata=meta, content=content)
        self.tree = get_object_tree(message)
        self.objects = {n: o.deflate() for n, o in get_all_nested_objects(message).items()}
        message.metadata.__dict__["_message_id"] = self.tree.object_id
        self.proto = message_to_proto(remove_content_from_message(message))

    @property
    def name(self) -> str:
        return str(self.tree.object_id)

    def rename(self, old: str, content: bytes) -> None:
        """Change an object, and every name and head above it so that all hashes fit."""
        names = {old: hashlib.sha256(content).hexdigest()}
        self.objects[names[old]] = content
        for name, held in list(self.objects.items()):
            head, _, body = held.partition(b"\0")
            if name != old and old.encode() in head + body and not head.startswith(b"ArrayChunk"):
                kind, named, _ = head.decode().split(" ")
                body = body.replace(old.encode(), names[old].encode())
                named = named.replace(old, names[old])
                self.rename(name, f"{kind} {named} {len(body)}".encode() + b"\0" + body)
                return self._retree(old, names[old])
        return self._retree(old, names[old])

    def _retree(self, old: str, new: str) -> None:
        def walk(tree: ObjectTree) -> None:
            if tree.object_id == old:
                tree.object_id = new
            for child in tree.children:
                walk(child)

        walk(self.tree)
        if self.proto.metadata.message_id == old:
            self.proto.metadata.message_id = new


class LyingServer(fleet_pb2_grpc.FleetServicer):
    def __init__(self, folder: Path) -> None:
        make_certificates(folder)
        self.port = free_ports(1)[0]
        self.waiting: queue.SimpleQueue[Packed] = queue.SimpleQueue()
        self.objects: dict[str, bytes] = {}
        self.replies: queue.Queue[Message] = queue.Queue()
        self.pushed: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.announced: dict[str, Message] = {}
        self.server = grpc.server(
            ThreadPoolExecutor(8), options=[("grpc.max_send_message_length", 2**30)]
        )
        fleet_pb2_grpc.add_FleetServicer_to_server(self, self.server)  # type: ignore[no-untyped-call]
        pair = ((folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes())
        self.server.add_secure_port(f"127.0.0.1:{self.port}", grpc.ssl_server_credentials([pair]))
        self.server.start()
        self.door = Door(f"127.0.0.1:{self.port}", (folder / "ca.pem").read_bytes(), new_key())

    def send(self, packed: Packed) -> None:
        self.objects |= packed.objects
        self.waiting.put(packed)

    def reply(self) -> Message:
        return self.replies.get(timeout=20)

    def ActivateNode(self, request, context):
        return fleet_pb2.ActivateNodeResponse(node_id=NODE)

    def DeactivateNode(self, request, context):
        return fleet_pb2.DeactivateNodeResponse()

    def SendNodeHeartbeat(self, request, context):
        return SendNodeHeartbeatResponse(success=True)

    def PullMessages(self, request, context):
        try:
            packed = self.waiting.get_nowait()
        except queue.Empty:
            return fleet_pb2.PullMessagesResponse()
        return fleet_pb2.PullMessagesResponse(
            messages_list=[packed.proto], message_object_trees=[packed.tree]
        )

    def PullObject(self, request, context):
        self.asked.append(request.object_id)
        content = self.objects.get(request.object_id)
        return PullObjectResponse(
            object_found=content is not None,
            object_available=bool(content),
            object_content=content or b"",
        )

    def ConfirmMessageReceived(self, request, context):
        return ConfirmMessageReceivedResponse()

    def PushMessages(self, request, context):
        message = message_from_proto(request.messages_list[0])
        name = message.metadata.message_id
        self.announced[name] = message
        if message.has_error():
            self.replies.put(message)
        wanted = [one.object_id for one in _walk(request.message_object_trees[0])]
        return fleet_pb2.PushMessagesResponse(objects_to_push=wanted, session_id="s")

    def PushObject(self, request, context):
        self.pushed[request.object_id] = request.object_content
        found = self.announced.get(request.object_id)
        if found is not None and found.has_content():
            self.replies.put(inflate_object_from_contents(request.object_id, dict(self.pushed)))
        return PushObjectResponse(stored=True)

    def GetFab(self, request, context):
        self.asked.append("code")
        context.abort(grpc.StatusCode.INTERNAL, "")

    def GetRun(self, request, context):
        self.asked.append("run")
        context.abort(grpc.StatusCode.INTERNAL, "")


def _walk(tree: ObjectTree) -> Iterator[ObjectTree]:
    for child in tree.children:
        yield from _walk(child)
    yield tree


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LyingServer]:
    server = LyingServer(tmp_path_factory.mktemp("liar"))
    yield server
    server.server.stop(None)


@pytest.fixture(scope="module")
def node(server: LyingServer) -> Iterator[Joined]:
    """One node for all attacks: it must outlive every one of them."""
    with joined(server.door, echo, most_bytes=20_000_000, poll=0.02, most_poll=0.05) as node:
        yield node


def words(**fields: object) -> RecordDict:
    return RecordDict({"fields": ConfigRecord(fields or {"round": time.time()})})  # type: ignore[arg-type]


def tensors(size: int) -> RecordDict:
    blob = np.random.default_rng(size).bytes(size)
    return RecordDict({"t": ArrayRecord({"blob": Array("uint8", (size,), "x", blob)})})


def of_kind(packed: Packed, kind: str) -> str:
    return next(n for n, c in packed.objects.items() if c.startswith(kind.encode() + b" "))


def altered(packed: Packed) -> None:
    name = of_kind(packed, "ConfigRecord")
    packed.objects[name] = packed.objects[name][:-1] + b"\x01"


def named_badly(packed: Packed) -> None:
    packed.tree.children[0].object_id = "../../etc/passwd"


def crowded(packed: Packed) -> None:
    for number in range(5000):
        packed.tree.children.add(object_id=hashlib.sha256(bytes([number % 256])).hexdigest())


def deep(packed: Packed) -> None:
    tree = packed.tree
    for number in range(80):
        tree = tree.children.add(object_id=hashlib.sha256(str(number).encode()).hexdigest())


def missing(packed: Packed) -> None:
    del packed.objects[of_kind(packed, "ConfigRecord")]


def announced_otherwise(packed: Packed) -> None:
    packed.proto.metadata.message_type = "evaluate"


def longer_lived(packed: Packed) -> None:
    packed.proto.metadata.ttl += 1000


def undecodable(packed: Packed) -> None:
    body = b"\xff" * 50
    packed.rename(of_kind(packed, "ConfigRecord"), b"ConfigRecord  50\0" + body)


def of_no_known_kind(packed: Packed) -> None:
    packed.rename(of_kind(packed, "ConfigRecord"), b"builtins.eval  1\0x")


def out_of_place(packed: Packed) -> None:
    packed.rename(of_kind(packed, "ConfigRecord"), b"RecordDict  2\0{}")


def wrong_length(packed: Packed) -> None:
    packed.rename(of_kind(packed, "ConfigRecord"), b"ConfigRecord  9999999\0x")


ATTACKS: list[tuple[Callable[[Packed], None], str]] = [
    (altered, "changed on the way"),
    (named_badly, "not a SHA-256"),
    (crowded, "more than 2048 objects"),
    (deep, "levels deep"),
    (missing, "not at the server"),
    (announced_otherwise, "not the one that was announced"),
    (longer_lived, "not the one that was announced"),
    (undecodable, "cannot be decoded"),
    (of_no_known_kind, "does not belong there"),
    (out_of_place, "does not belong there"),
    (wrong_length, "not as long as it says"),
]


@pytest.mark.parametrize(("attack", "said"), ATTACKS, ids=lambda one: getattr(one, "__name__", ""))
def test_a_message_that_was_tampered_with_is_refused(
    server: LyingServer, node: Joined, attack: Callable[[Packed], None], said: str
) -> None:
    packed = Packed(words())
    before = set(packed.objects)
    attack(packed)
    for name in before - set(packed.objects):
        server.objects.pop(name, None)
    server.send(packed)
    refused = server.reply()
    assert said in str(refused.error.reason)
    assert refused.metadata.reply_to_message_id == packed.name
    server.send(Packed(words(round=1)))
    assert server.reply().content["fields"] == ConfigRecord({"round": 1})


def test_a_small_message_that_would_be_huge_is_refused(server: LyingServer, node: Joined) -> None:
    """One chunk of 1 MB named 10,000 times is 10 GB put together."""
    packed = Packed(tensors(1_000_000))
    name = of_kind(packed, "Array")
    head, _, body = packed.objects[name].partition(b"\0")
    bomb = json.dumps(json.loads(body) | {"arraychunk_ids": [0] * 10_000}).encode()
    named = head.decode().split(" ")[1]
    packed.rename(name, f"Array {named} {len(bomb)}".encode() + b"\0" + bomb)
    server.send(packed)
    assert "its arrays are larger" in str(server.reply().error.reason)
    server.send(Packed(tensors(1_000_000)))
    assert len(server.reply().content.array_records["t"]["blob"].data) == 1_000_000


def test_more_bytes_than_allowed_are_not_fetched(server: LyingServer, node: Joined) -> None:
    packed = Packed(tensors(60_000_000))
    server.asked.clear()
    server.send(packed)
    assert "larger than 20,000,000 bytes" in str(server.reply().error.reason)
    assert len(server.asked) <= 20_000_000 // (5 * 2**20) + 4


def test_objects_that_never_come_end_with_the_message(server: LyingServer, node: Joined) -> None:
    packed = Packed(words(), ttl=1.5)
    packed.objects[of_kind(packed, "ConfigRecord")] = b""
    server.send(packed)
    node.wait_for("late", node.kinds().count("late") + 1)
    server.send(Packed(words(round=2)))
    assert server.reply().has_content()


def test_a_message_for_another_node_is_dropped(server: LyingServer, node: Joined) -> None:
    before = node.kinds().count("asked")
    server.send(Packed(words(round=3), node=78))
    server.send(Packed(words(round=4)))
    assert server.reply().content["fields"] == ConfigRecord({"round": 4})
    assert node.kinds().count("asked") == before + 1


def test_what_is_asked_twice_is_computed_once(tmp_path: Path) -> None:
    server = LyingServer(tmp_path)
    counted: list[int] = []

    def count(message: Message) -> Message:
        counted.append(1)
        fields = ConfigRecord({"times": len(counted)})
        return Message(RecordDict({"fields": fields}), reply_to=message)

    packed = Packed(words())
    with joined(server.door, count, poll=0.02):
        server.send(packed)
        first = server.reply()
        server.send(packed)
        again = server.reply()
    server.server.stop(None)
    assert len(counted) == 1
    assert first.content == again.content
    assert vars(first.metadata) == vars(again.metadata)


def test_no_code_was_ever_asked_for(server: LyingServer, node: Joined) -> None:
    server.send(Packed(words()))
    assert server.reply().has_content()
    assert not {"code", "run"} & set(server.asked)


def test_random_damage_is_an_error_and_nothing_else() -> None:
    """20,000 messages with damaged objects: refused, or decoded within the limit."""
    rng = random.Random(7)
    whole = Packed(
        RecordDict({"fields": ConfigRecord({"a": 1, "b": "x", "c": b"y"}), **tensors(300)})
    )
    wanted = plan(whole.tree)
    names = list(whole.objects)
    refused = 0
    for _ in range(20_000):
        contents = dict(whole.objects)
        name = rng.choice(names)
        content = bytearray(contents[name])
        for _ in range(rng.randint(1, 4)):
            match rng.randint(0, 3):
                case 0:
                    content[rng.randrange(len(content))] = rng.randrange(256)
                case 1:
                    del content[rng.randrange(len(content)) :]
                case 2:
                    at = rng.randrange(len(content) + 1)
                    content[at:at] = rng.randbytes(rng.randint(1, 9))
                case _:
                    at = rng.randrange(len(content) + 1)
                    content[at:at] = rng.choice([b"9" * 30, b"[[[[", b"-1,", b"null", b"1e999"])
            content = content or bytearray(b"\0")
        contents[name] = bytes(content)
        try:
            message = inflate(whole.name, contents, wanted, 10_000)
        except FedtuneError:
            refused += 1
            continue
        assert (
            sum(len(a.data) for r in message.content.array_records.values() for a in r.values())
            <= 10_000
        )
    assert refused > 10_000


def test_fetch_ends_when_the_node_stops(server: LyingServer) -> None:
    from fedtune.client.fleet_line import Signer, open_line

    packed = Packed(words())
    name = of_kind(packed, "ConfigRecord")
    server.objects[name] = b""
    line = open_line(server.door, Signer(server.door.login))
    line.activate()
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(FedtuneError, match="stopping"):
        fetch(line, 5, {name: (2, ())}, 1000, time.time() + 60, stop)
    line.close()

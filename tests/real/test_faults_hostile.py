"""A node that answers twice, late, for another round or another run: the others' run is as ever."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from flwr.app import Message
from flwr.common.serde import message_from_proto

from fedtune.client.fleet_door import Door
from fedtune.client.fleet_line import Line, Signer, open_line
from fedtune.client.fleet_objects import deflate, fetch, inflate, plan, send
from fedtune.client.node import Node
from fedtune.client.policy import read_policy
from fedtune.errors import FedtuneError
from fedtune.keys.node import read_identity
from fedtune.terms import Own
from fedtune.wire import Update, from_record, to_record
from tests.real.faults import PATIENCE, events, same, undisturbed
from tests.real.kit import Federation, federation

MOST = 1 << 28
DEADLINE = 20.0


class Hostile:
    """An enrolled node whose connection is the test's own: it computes well and answers badly."""

    def __init__(self, made: Federation, name: str) -> None:
        torch.set_num_threads(1)
        folder, root = made.folder, (made.folder / "keys" / "ca.pem").read_bytes()
        identity = read_identity(folder / f"{name}.key")
        home = folder / f"{name}.node"
        own = Own(
            name=name, source=str(folder / f"{name}.jsonl"), dataset=name,
            ledger=str(home / "ledger.db"), model="", data={}, threads=1, device="cpu", body="",
            body_root="", body_key="",
        )  # fmt: skip
        self.node = Node(home, identity, root, read_policy(folder / "open.toml"), own)
        self.door = Door(f"127.0.0.1:{made.port}", root, identity.login)
        self.line: Line = open_line(self.door, Signer(identity.login))
        self.stop, self.refusals = threading.Event(), list[str]()
        self.errors: list[BaseException] = []
        self.turns = itertools.count()

    def run(self) -> None:
        try:
            self._join()
            threading.Thread(target=self._beat, daemon=True).start()
            while not self.stop.wait(0.05):
                self._once()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            code = error.code() if isinstance(error, grpc.Call) else None
            # The server ends before this node does.
            if not self.stop.is_set() and code is not grpc.StatusCode.UNAVAILABLE:
                self.errors.append(error)

    def _join(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self.line.activate()
                return
            except grpc.RpcError:
                assert time.monotonic() < end
                time.sleep(0.2)

    def _beat(self) -> None:
        while not self.stop.wait(4):
            try:
                self.line.beat()
            except (grpc.RpcError, ValueError):
                return

    def _once(self) -> None:
        response = self.line.pull(self.stop)
        if response is None or not response.messages_list:
            return
        meta = message_from_proto(response.messages_list[0]).metadata
        tree = response.message_object_trees[0]
        wanted = plan(tree)
        contents = fetch(
            self.line, meta.run_id, wanted, MOST, meta.created_at + meta.ttl, self.stop
        )
        self.line.confirm(meta.run_id, tree.object_id)
        message = inflate(tree.object_id, contents, wanted, MOST)
        reply = self.node.answer(message)
        if meta.message_type != "train":
            self._send(reply)
            return
        tricks: list[Callable[[Message, Message], None]] = [
            self._twice, self._elsewhere, self._other_round, self._disguised, self._late,
        ]  # fmt: skip
        turn = next(self.turns)
        (tricks[turn] if turn < len(tricks) else lambda _asked, well: self._send(well))(
            message, reply
        )

    def _send(self, reply: Message, change: Callable[[Any], None] = lambda _proto: None) -> None:
        """Send a reply whose announcement is changed; note what the server says."""
        parcel = deflate(reply, 0.0, MOST)
        change(parcel.request.messages_list[0].metadata)
        try:
            if send(self.line, parcel) is None:
                self.refusals.append("not taken")
        except grpc.RpcError as error:
            self.refusals.append(str(error.details()))  # type: ignore[attr-defined]
        except FedtuneError as error:
            self.refusals.append(str(error))

    def _spoilt(self, asked: Message, well: Message, **fields: int) -> Message:
        """Return another answer to the same question."""
        update = from_record(Update, well.content)
        tensors = {name: value + 1.0 for name, value in update.tensors.items()}
        return Message(
            to_record(dataclasses.replace(update, tensors=tensors, **fields)), reply_to=asked
        )

    def _twice(self, asked: Message, well: Message) -> None:
        self._send(well)
        self._send(well)
        self._send(self._spoilt(asked, well))

    def _elsewhere(self, asked: Message, well: Message) -> None:
        """Answer in another run, and in another node's name, before answering well."""
        self._send(self._spoilt(asked, well), lambda meta: setattr(meta, "run_id", meta.run_id ^ 5))
        self._send(
            self._spoilt(asked, well),
            lambda meta: setattr(meta, "src_node_id", meta.src_node_id ^ 1),
        )
        self._send(
            self._spoilt(asked, well),
            lambda meta: setattr(meta, "reply_to_message_id", "0" * 64),
        )
        self._send(well)

    def _other_round(self, asked: Message, well: Message) -> None:
        self._send(self._spoilt(asked, well, round=1))

    def _disguised(self, asked: Message, well: Message) -> None:
        """Announce an answer to the own question; what follows says that it is to another's."""
        other = self._spoilt(asked, well)
        other.metadata.__dict__["_reply_to_message_id"] = "f" * 64
        self._send(
            other, lambda meta: setattr(meta, "reply_to_message_id", asked.metadata.message_id)
        )

    def _late(self, asked: Message, well: Message) -> None:
        """Announce an answer of which nothing comes until nobody waits for it."""
        meta, parcel = asked.metadata, deflate(self._spoilt(asked, well), 0.0, MOST)
        parcel.request.node.node_id = self.line.node
        self.line.push(parcel.request)
        time.sleep(max(0.0, meta.created_at + meta.ttl - time.time()) + 1.0)
        self._send(self._spoilt(asked, well))


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_node_that_answers_twice_late_and_for_others_changes_nothing(tmp_path: Path) -> None:
    settings = "quorum = 1.0\nretries = 9\n"
    with federation(tmp_path, rounds=4, settings=settings, deadline=DEADLINE) as made:
        server = made.serve()
        made.join("ward-1")
        made.join("ward-2")
        bad = Hostile(made, "ward-3")
        thread = threading.Thread(target=bad.run, daemon=True)
        thread.start()
        try:
            assert server.wait(PATIENCE) == 0, made.logs()
        finally:
            bad.stop.set()
            bad.line.close()
            thread.join(20)
        assert not bad.errors
        assert next(bad.turns) >= 7
        assert len(bad.refusals) >= 5, bad.refusals
        assert [row["round"] for row in made.rows()] == [0, 1, 2, 3, 4]
        assert all(row["clients_ok"] == 3 for row in made.rows()[1:])
        told = [row for row in events(made, "client_done") if row["outcome"] != "ok"]
        assert {row["client"] for row in told} == {"ward-3"}
        assert any("answers round 1." in row["reason"] for row in told), told
        assert any("not the one that was announced" in row["reason"] for row in told), told
        assert any(f"no answer within {DEADLINE:g} s" in row["reason"] for row in told), told
        assert same(made.adapter(), undisturbed(made))

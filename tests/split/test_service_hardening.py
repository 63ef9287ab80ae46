"""What a hostile client can take from the body's server, and a hostile body from a client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from fedtune.client import body_wire
from fedtune.client.body_wire import RpcWire
from fedtune.errors import ExitCode, FedtuneError
from fedtune.keys.node import (
    line_of,
    new_identity,
    new_key,
    public_line,
    public_of,
    write_identity,
)
from fedtune.server import body_server
from fedtune.server.body_server import Door
from fedtune.split import body_pb2 as pb
from fedtune.split import node_keys
from fedtune.split.calls import PACKAGE, Limits, Refused, Status, loopback, plain
from fedtune.split.frames import frames, seal
from fedtune.split.node_keys import Claim, Gate, admit, metadata_of
from fedtune.split.rows import Rows
from tests.split import service_kit as kit
from tests.split.service_kit import ROWS, link, numbers, service

CLAIM = Claim("Forward", "run-1", "ann", "body", kit.DIGEST, b"\1" * 32)


# ------------------------------------------------------------ silent callers


def _enrolled(folder: Path) -> Path:
    """Enrol ann; her key is ``folder / "ann"``."""
    ann = new_identity("ann")
    write_identity(folder / "ann", ann)
    (folder / "enrolled").write_text(line_of(public_of(ann)) + "\n")
    return folder / "enrolled"


class Silent:
    """Calls that are opened and then say nothing."""

    def __init__(self, address: str) -> None:
        self._over = threading.Event()
        self._channel = grpc.insecure_channel(address)

    def call(self, method: str, metadata: Any = None) -> Any:
        def nothing() -> Iterator[bytes]:
            self._over.wait(30)
            yield from ()

        raw = self._channel.stream_stream(f"/{PACKAGE}/{method}")
        return raw(nothing(), timeout=30, metadata=metadata)

    def close(self) -> None:
        self._over.set()
        self._channel.close()


def _soon(call: Any, seconds: float) -> str:
    """Return the status that a call ended with in time, or "nothing"."""
    end = time.monotonic() + seconds
    while call.is_active() and time.monotonic() < end:
        time.sleep(0.01)
    return "nothing" if call.is_active() else str(call.code().name)


def test_who_is_not_enrolled_holds_no_thread(tmp_path: Path) -> None:
    enrolled, made = _enrolled(tmp_path), service()
    running = body_server.start(made, Door(enrolled=enrolled), made.limits)
    silent = Silent(running.address)
    stranger = metadata_of(new_key(), Claim(**{**CLAIM.__dict__, "client": "eve"}))
    late = [
        (name, "1" if name == "fedtune-time" else value)
        for name, value in metadata_of(new_key(), CLAIM)
    ]
    for method in ("Forward", "Open"):
        for metadata, status in (
            (None, "UNAUTHENTICATED"), (stranger, "PERMISSION_DENIED"), (late, "PERMISSION_DENIED"),
        ):  # fmt: skip
            assert _soon(silent.call(method, metadata), 2) == status
    link(made, "bob").forward(numbers(1), ROWS, None, "s", grad=False)
    calls = [silent.call("Open" if index % 2 else "Forward") for index in range(64)]
    start = time.monotonic()
    who = kit.caller(key=tmp_path / "ann")
    over = kit.open_link(running.address, who, kit.LinkSettings(patience=10))
    over.forward(numbers(1), ROWS, None, "s", grad=False)
    assert time.monotonic() - start < 3
    assert {_soon(call, 1) for call in calls} <= {"UNAUTHENTICATED", "RESOURCE_EXHAUSTED"}
    over.close()
    silent.close()
    running.stop(0)


def test_silence_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_server, "_FIRST_SECONDS", 0.5)
    made = service()
    for enrolled in (None, _enrolled(tmp_path)):
        running = body_server.start(made, Door(enrolled=enrolled), made.limits)
        silent = Silent(running.address)
        # Ann's name is no secret: what only looks signed is let wait for its header.
        calls = [
            silent.call("Open" if index % 2 else "Forward", metadata_of(new_key(), CLAIM))
            for index in range(8)
        ]
        time.sleep(0.2)
        assert all(call.is_active() for call in calls)
        assert {_soon(call, 3) for call in calls} == {"CANCELLED"}
        time.sleep(0.1)
        assert not [one for one in threading.enumerate() if isinstance(one, threading.Timer)]
        silent.close()
        running.stop(0)


def test_who_has_said_who_it_is_may_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_server, "_FIRST_SECONDS", 0.3)
    made = service()
    running = body_server.start(made, Door(), made.limits)
    header = pb.Header(
        run="run-1", client="ann", step="s", part=pb.FORWARD, model=kit.DIGEST,
        cut=pb.Cut(head=1, tail=1, count=4), rows=pb.Rows(batch=2, length=5),
    )  # fmt: skip

    def slowly() -> Iterator[bytes]:
        for chunk in frames(header, [seal(pb.HIDDEN, numbers(1))], 600):
            yield chunk.SerializeToString()
            time.sleep(0.25)

    with grpc.insecure_channel(running.address) as channel:
        assert list(channel.stream_stream(f"/{PACKAGE}/Forward")(slowly(), timeout=20))
    running.stop(0)


def test_a_first_message_is_small_on_a_slow_line() -> None:
    rows = Rows(8, 60)
    hidden = numbers(1, 8, 60)
    sealed = [seal(pb.HIDDEN, torch.cat([hidden] * 2))]
    reply = pb.OpenReply(chunk_bytes=1 << 20, tensor_bytes=1 << 28)
    sent = list(body_wire._sent(pb.Header(step="s"), sealed, reply))
    assert [len(chunk.data) for chunk in sent] == [0, 16 * 60 * 32 * 4]
    assert len(list(body_wire._sent(pb.Header(), [seal(pb.HIDDEN, numbers(1))], reply))) == 1
    made = service()
    long = link(made).forward(hidden, rows, None, "s", grad=False)
    assert torch.equal(long, link(made, "bob").forward(hidden, rows, None, "s", grad=False))


# ------------------------------------------------------------ a body that lies


class Liar:
    """A body whose answers somebody else has written."""

    def __init__(self, reply: pb.OpenReply, answer: Callable[[], Iterable[pb.Chunk]]) -> None:
        self._reply = reply
        self._answer = answer

    def open(self, request: pb.OpenRequest) -> pb.OpenReply:
        return self._reply

    def call(
        self, part: pb.Part, chunks: Iterable[pb.Chunk], seconds: float | None = None
    ) -> Iterator[pb.Chunk]:
        list(chunks)
        yield from self._answer()


REPLY = pb.OpenReply(chunk_bytes=(1 << 32) - 1, tensor_bytes=(1 << 64) - 1, credits=4)


def test_a_bodys_limits_are_no_larger_than_the_clients() -> None:
    over = link(Liar(REPLY, tuple))
    assert (over.limits.chunk_bytes, over.limits.tensor_bytes) == (1 << 20, 256 << 20)
    small = pb.OpenReply(chunk_bytes=600, tensor_bytes=4096)
    assert link(Liar(small, tuple)).limits == small
    for chunk, tensor in ((0, 4096), (1, 4096), (600, 0)):
        reply = pb.OpenReply(chunk_bytes=chunk, tensor_bytes=tensor)
        with pytest.raises(FedtuneError, match="_bytes=") as caught:
            link(Liar(reply, tuple))
        assert caught.value.code == ExitCode.ENGINE


def _tensor(
    name: Any = pb.OUTPUT, codec: Any = pb.NONE, shape: Any = (2, 5, 32), *pieces: Any
) -> pb.Tensor:
    made = [pb.Piece(dtype=pb.FLOAT32, shape=piece) for piece in pieces or (shape,)]
    return pb.Tensor(name=name, codec=codec, shape=shape, pieces=made, sha256=bytes(32))


LIES = {
    "another name": [_tensor(pb.HIDDEN)],
    "a name that is none": [_tensor(77)],
    "two": [_tensor(), _tensor()],
    "one more": [_tensor(), _tensor(pb.HIDDEN)],
    "nothing": [],
    "another shape": [_tensor(shape=(2, 5, 33))],
    "another codec": [_tensor(codec=pb.LOW_RANK)],
    "more bytes than the shape": [_tensor(pb.OUTPUT, pb.NONE, (2, 5, 32), (2, 5, 33))],
    "more bytes than there are": [_tensor(pb.OUTPUT, pb.NONE, (2, 5, 32), (1 << 31, 1 << 28))],
    "a type that is none": [
        pb.Tensor(name=pb.OUTPUT, shape=(2, 5, 32), pieces=[pb.Piece(dtype=99, shape=(2, 5, 32))])
    ],
}  # fmt: skip


@pytest.mark.parametrize("what", LIES)
def test_what_is_not_due_is_not_collected(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.client.body_link._FIRST_WAIT", 0.001)
    asked: list[str] = []

    def answer() -> Iterator[pb.Chunk]:
        yield pb.Chunk(header=pb.Header(tensors=LIES[what]))
        asked.append(what)
        yield pb.Chunk(data=bytes(1280))

    with pytest.raises(FedtuneError, match="refused"):
        link(Liar(REPLY, answer)).forward(numbers(1), ROWS, None, "s", grad=False)
    assert not asked


def test_an_answer_that_breaks_the_reader_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.client.body_link._FIRST_WAIT", 0.001)
    for error in (RuntimeError, ValueError):
        broken = _raising(error("no\nmemory"))
        with monkeypatch.context() as patch:
            patch.setattr(body_wire, "payload", broken)
            made = service()
            running = body_server.start(made, Door(), made.limits)
            over = link(running.address)
            with pytest.raises(FedtuneError, match=r"cannot be read: no\?memory"):
                over.forward(numbers(1), ROWS, None, "s", grad=False)
            over.close()
            running.stop(0)
        with monkeypatch.context() as patch:
            patch.setattr("fedtune.client.body_link.unseal", broken)
            with pytest.raises(FedtuneError, match=r"no\?memory"):
                link(service()).forward(numbers(1), ROWS, None, "s", grad=False)


def _raising(error: Exception) -> Callable[..., Any]:
    def broken(*_: Any) -> Any:
        raise error

    return broken


def test_a_body_that_never_has_anything_is_given_up() -> None:
    lost = Refused(Status.NOT_FOUND, "nothing is held")
    over = link(Liar(REPLY, _raising(lost)))
    with pytest.raises(FedtuneError, match="nothing is held"):
        over.forward(numbers(1), ROWS, None, "s", grad=True)
    with pytest.raises(FedtuneError, match="nothing is held"):
        over.backward(numbers(1), ROWS, None, numbers(2), "s")


def test_a_bodys_words_are_shown_on_one_line() -> None:
    assert plain("x" * 501) == "x" * 500
    words = "all well\n\x1b[2J\u202e" + "x" * 2000
    bad = Liar(REPLY, _raising(Refused(Status.ABORTED, words, "do\rthis" + words)))
    running = body_server.start(bad, Door(), Limits())
    for target in (running.address, bad):
        over = link(target)
        with pytest.raises(FedtuneError, match="all well") as caught:
            over.forward(numbers(1), ROWS, None, "s", grad=False)
        for said in (str(caught.value), caught.value.hint or ""):
            assert said.isprintable()
            assert 300 < len(said) < 700
        over.close()
    running.stop(0)
    waiting = Liar(REPLY, _raising(Refused(Status.UNAVAILABLE, words)))
    with pytest.raises(FedtuneError, match="no answer") as caught:
        link(waiting, patience=0.2).forward(numbers(1), ROWS, None, "s", grad=False)
    assert str(caught.value).isprintable()


# ------------------------------------------------------------ what a call may cost


def _ask(made: Any, batch: int, length: int, past: int = 0) -> Any:
    header = pb.Header(
        run="run-1", client="eve", step="s", part=pb.GO_ON, model=kit.DIGEST,
        cut=pb.Cut(head=1, tail=1, count=4), rows=pb.Rows(batch=batch, length=length, past=past),
    )  # fmt: skip
    sealed = [seal(pb.HIDDEN, numbers(1, batch, length))]
    return list(made.call(pb.GO_ON, frames(header, sealed, 1 << 20)))


def test_attention_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1 row of 60: 7,680 bytes of hidden states, 14,400 of pairs.
    made = service(limits=Limits(tensor_bytes=14_399))
    with pytest.raises(Refused, match="14400 bytes") as caught:
        _ask(made, 1, 60)
    assert caught.value.status == Status.OUT_OF_RANGE
    with pytest.raises(Refused, match="attention"):
        _ask(made, 3, 20, 44)
    assert _ask(service(limits=Limits(tensor_bytes=14_400)), 1, 60)
    # In flight, two of them do not fit where their hidden states would.
    both = service(limits=Limits(flight_bytes=40_000))
    sizes: list[int] = []
    run = both.body.go_on

    def seen(*given: Any) -> Any:
        sizes.append(both._bytes)
        return run(*given)

    monkeypatch.setattr(both.body, "go_on", seen)
    _ask(both, 1, 60)
    assert sizes == [7680 + 7680 + 14_400]
    assert both._bytes == 0


def test_a_row_is_no_longer_than_the_model_takes() -> None:
    made = service()
    assert made.positions == 64
    assert _ask(made, 1, 64)
    with pytest.raises(Refused, match="rows of 65") as caught:
        _ask(made, 1, 65)
    assert caught.value.status == Status.OUT_OF_RANGE
    assert service(limits=Limits(positions=32)).positions == 32


def test_one_client_cannot_use_up_what_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_keys, "_NONCES", 3)
    ann, bob = new_key(), new_key()
    path = tmp_path / "enrolled"
    path.write_text(f"ann {public_line(ann)}\nbob {public_line(bob)}\n")
    gate = Gate.at(path, "body")
    for _ in range(3):
        admit(gate, metadata_of(ann, CLAIM), CLAIM)
    with pytest.raises(Refused, match="client 'ann'") as caught:
        admit(gate, metadata_of(ann, CLAIM), CLAIM)
    assert caught.value.status == Status.RESOURCE_EXHAUSTED
    of_bob = Claim(**{**CLAIM.__dict__, "client": "bob"})
    for _ in range(3):
        admit(gate, metadata_of(bob, of_bob), of_bob)
    now = time.time()
    monkeypatch.setattr(node_keys.time, "time", lambda: now + 700)
    for _ in range(3):
        admit(gate, metadata_of(ann, CLAIM), CLAIM)
    assert gate._counts == {"ann": 3}


@pytest.mark.parametrize("host", ["127.evil.example", "127.0.0.1.evil.example", "localhost.evil"])
def test_a_name_that_looks_near_is_not(host: str) -> None:
    assert not loopback(host)
    with pytest.raises(FedtuneError, match="without TLS"):
        RpcWire(f"{host}:1")
    with pytest.raises(FedtuneError, match="open to other machines"):
        body_server.start(service(), Door(listen=f"{host}:0"), Limits())
    for near in ("localhost:1", "127.0.0.9:1", "[::1]:1"):
        RpcWire(near).close()


def test_names_of_runs_do_not_fill_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    made = service(met=lambda run, client, codec: said.append(client))
    for index in range(40):
        kit.open_link(made, kit.caller("eve", run=f"run-{index}"))
    assert said == ["eve"] * 16
    link(made, "ann")
    link(made, "ann")
    assert said[16:] == ["ann"]
    for index in range(1100):
        link(made, f"c{index}")
    assert len(said) == 1024
    later = time.monotonic() + 3601
    monkeypatch.setattr("fedtune.server.body_service.time.monotonic", lambda: later)
    link(made, "bob")
    assert said[1024:] == ["bob"]

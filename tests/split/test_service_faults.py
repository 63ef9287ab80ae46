"""A body server that dies, comes back, answers late, twice or in another order changes nothing.

Between the client and a server in another process stands a proxy of messages, which sees
each call and does to it what the test asks for.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from fedtune.client.body_link import Caller, Link, LinkSettings, open_link
from fedtune.client.remote import connect, ends
from fedtune.configfile import load
from fedtune.errors import FedtuneError
from fedtune.models import load_base
from fedtune.server.body_service import BodyService
from fedtune.simulations.body_process import BodyProcess, load_body, start_body
from fedtune.split import body_pb2 as pb
from fedtune.split.blocks import cut_of
from fedtune.split.calls import PACKAGE
from fedtune.split.rows import Rows
from tests.split.service_kit import same

STEPS = 12
CONFIG = """
schema = 1
[tuning]
method = "sfprompt"
adapter = "sfprompt"
[tuning.split]
head = 1
tail = 1
"""


@dataclass
class Proxy:
    """Hands each call on to the server; ``meddle`` may do it otherwise.

    ``meddle(number, method, chunks, hand_on)`` gets all chunks of the request.
    """

    target: str
    meddle: Callable[..., list[bytes]] | None = None
    heard: list[tuple[str, list[bytes]]] = field(default_factory=list)
    address: str = ""
    server: Any = None

    def __post_init__(self) -> None:
        self.server = grpc.server(ThreadPoolExecutor(16), options=(("grpc.so_reuseport", 0),))
        self.server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()
        self.channel = grpc.insecure_channel(
            self.target, (("grpc.max_reconnect_backoff_ms", 200),
                          ("grpc.initial_reconnect_backoff_ms", 100),
                          ("grpc.min_reconnect_backoff_ms", 100)),
        )  # fmt: skip

    def service(self, details: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(
            lambda chunks, context: self._serve(details.method, chunks, context)
        )

    def _serve(self, method: str, chunks: Iterator[bytes], context: Any) -> Iterator[bytes]:
        heard = list(chunks)
        self.heard.append((method, heard))
        number = len(self.heard)

        def hand_on(sent: list[bytes], name: str = method) -> list[bytes]:
            return list(self.channel.stream_stream(name)(iter(sent), timeout=30))

        try:
            if self.meddle is None:
                yield from hand_on(heard)
            else:
                yield from self.meddle(number, method.rpartition("/")[2], heard, hand_on)
        except grpc.RpcError as error:
            context.set_trailing_metadata(error.trailing_metadata() or ())
            context.abort(error.code(), error.details())
        except ValueError:
            # The test is over, and the channel closed: a late call waits for nothing.
            return

    def stop(self) -> None:
        self.server.stop(0).wait()
        self.channel.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("split") / "split.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def setting(file: Path) -> tuple[Any, str, Any]:
    """Return the client's part, the digest and a body of the same model in this process."""
    torch.set_num_threads(1)
    config = load(file)
    body, digest = load_body(config)
    base = load_base(config.model, ("0", "1"), config.seed, config.data.template, ends(1, 1))
    return base.model, digest, body


@pytest.fixture(scope="module")
def server(file: Path) -> Iterator[BodyProcess]:
    with start_body(file) as made:
        yield made


@pytest.fixture
def proxy(server: BodyProcess) -> Iterator[Proxy]:
    made = Proxy(server.address)
    yield made
    made.stop()


def _link(setting: Any, target: Any, client: str = "ann", **settings: Any) -> Link:
    model, digest, _ = setting
    cut = cut_of(model, 1, 1)
    who = Caller("run-1", client, digest, cut)
    return open_link(target, who, LinkSettings(**{"patience": 60.0} | settings))


def _loop(setting: Any, over: Link, before: Callable[[int], None] = int) -> dict[str, Any]:
    """Tune LoRA on both ends for some steps; return what was tuned."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    model = get_peft_model(
        copy.deepcopy(setting[0]), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    connect(model, over)
    tuned = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert any("layers.0." in name for name in tuned)
    optimizer = torch.optim.AdamW(tuned.values(), lr=1e-2)
    rng = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        before(step)
        ids = torch.randint(3, 300, (4, 24), generator=rng)
        mask = torch.ones_like(ids)
        mask[1, 20:] = 0
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in tuned.items()}


@pytest.fixture(scope="module")
def undisturbed(setting: Any, server: BodyProcess) -> dict[str, Any]:
    over = _link(setting, server.address, "calm")
    found = _loop(setting, over)
    assert over.traffic.calls == 1 + 2 * STEPS
    over.close()
    return found


def test_another_process_gives_the_bits_of_this_one(setting: Any, undisturbed: Any) -> None:
    made = BodyService(setting[2], setting[1])
    assert same(undisturbed, _loop(setting, _link(setting, made)))
    made.close()


def _halved(chunks: list[bytes]) -> bytes:
    """Return the beginning of a message: its header, and half of its first tensor."""
    first = pb.Chunk.FromString(chunks[0])
    first.data = first.data[: len(first.data) // 2]
    return first.SerializeToString()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["in forward", "in backward", "answered", "between steps"])
def test_a_server_that_is_killed_loses_nothing(
    when: str, setting: Any, undisturbed: Any, server: BodyProcess, proxy: Proxy
) -> None:
    deaths: list[int] = []
    restarts: list[threading.Thread] = []

    def die() -> None:
        deaths.append(server.pid)
        server.kill()
        restarts.append(threading.Thread(target=server.restart))
        restarts[-1].start()

    def meddle(number: int, method: str, chunks: list[bytes], hand_on: Any) -> list[bytes]:
        if deaths or number < 8:
            return hand_on(chunks)
        if (when, method) in (("in forward", "Forward"), ("in backward", "Backward")):
            # The server has the header and half of the tensor, and waits for the rest.
            gate, first = threading.Event(), _halved(chunks)

            def half() -> Iterator[bytes]:
                yield first
                gate.wait(20)

            call = proxy.channel.stream_stream(f"/{PACKAGE}/{method}")(half(), timeout=20)
            time.sleep(0.1)
            assert call.is_active()
            die()
            gate.set()
            return list(call)
        if when == "answered" and method == "Backward":
            hand_on(chunks)
            die()
            return hand_on(chunks)
        return hand_on(chunks)

    def before(step: int) -> None:
        if when == "between steps" and step == 5:
            die()

    proxy.meddle = meddle
    over = _link(setting, proxy.address, f"killed-{when.replace(' ', '-')}")
    found = _loop(setting, over, before)
    for thread in restarts:
        thread.join()
    assert len(deaths) == 1
    assert deaths[0] != server.pid
    assert over.traffic.calls > 1 + 2 * STEPS
    assert same(found, undisturbed)
    over.close()


def test_delayed_repeated_and_reordered_calls_change_nothing(
    setting: Any, undisturbed: Any, proxy: Proxy
) -> None:
    kept: list[tuple[str, list[bytes]]] = []
    done = {"late": 0, "twice": 0, "lost": 0, "old": 0}

    def repeated(chunks: list[bytes], hand_on: Any) -> Any:
        try:
            return hand_on(chunks)[:1]
        except grpc.RpcError as error:
            return error.code().name

    def meddle(number: int, method: str, chunks: list[bytes], hand_on: Any) -> list[bytes]:
        kept.append((f"/{PACKAGE}/{method}", chunks))
        if number % 5 == 0:
            # The answer comes when nobody waits for it any more: the client has called again.
            time.sleep(0.6)
            done["late"] += 1
        elif number % 5 == 1:
            first = hand_on(chunks)
            # Only what was let go with its answer may be asked for again.
            again = repeated(chunks, hand_on)
            assert again == first[:1] or (method == "Backward" and again == "NOT_FOUND")
            done["twice"] += 1
            return first
        elif number % 5 == 2:
            hand_on(chunks)
            done["lost"] += 1
            time.sleep(0.6)
        elif number % 5 == 3:
            # Calls of earlier steps arrive now, the last first.
            for name, old in reversed(kept[-6:-1]):
                if name.endswith("Open"):
                    continue
                answer = repeated(old, lambda sent, name=name: hand_on(sent, name))
                assert answer == "NOT_FOUND" or len(answer) == 1
                done["old"] += 1
        return hand_on(chunks)

    proxy.meddle = meddle
    over = _link(setting, proxy.address, "jumbled", deadline=0.4)
    assert same(_loop(setting, over), undisturbed)
    assert min(done.values()) > 2, done
    over.close()


def test_a_bad_client_disturbs_nobody(setting: Any, undisturbed: Any, server: BodyProcess) -> None:
    found: dict[str, Any] = {}

    def client(name: str) -> None:
        torch.set_num_threads(1)
        found[name] = _loop(setting, _link(setting, server.address, name))

    rng = torch.Generator().manual_seed(2)
    good = threading.Thread(target=client, args=("good",))
    good.start()
    refusals = 0
    while good.is_alive():
        bad = _link(setting, server.address, "bad")
        hidden = torch.randn(4, 24, setting[2].width, generator=rng)
        hidden[0, 0, 0] = torch.nan
        for tensor, rows in (
            (hidden, Rows(4, 24)), (hidden.half(), Rows(4, 24)), (hidden[:2], Rows(4, 24)),
            (hidden, Rows(4, 1 << 20)),
        ):  # fmt: skip
            with pytest.raises(FedtuneError, match="refused"):
                bad.forward(tensor, rows, None, "s", grad=True)
            refusals += 1
        with pytest.raises(FedtuneError, match="FAILED_PRECONDITION"):
            open_link(server.address, Caller("run-1", "bad", "other", cut_of(setting[0], 1, 1)))
        bad.close()
    good.join()
    assert refusals > 4
    assert same(found["good"], undisturbed)


def test_the_server_ends_well_and_tells_of_its_clients(file: Path, setting: Any) -> None:
    made = start_body(file, ["--graphs", "2"])
    _link(setting, made.address, "hospital-7").close()
    _link(setting, made.address, "hospital-7").close()
    said = made.said()
    assert said.count("hospital-7") == 1
    assert f"blocks 1 to {setting[2].cut.count - 2}" in said
    # A parent that is gone closes the pipe: the child goes too.
    child = made._child
    assert child is not None
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(10) == 0
    made.close()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    path = tmp_path / "plain.toml"
    path.write_text("schema = 1\n")
    with pytest.raises(FedtuneError, match="has no body to serve"):
        start_body(path)

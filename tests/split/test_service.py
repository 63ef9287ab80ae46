"""The body as a service: the same numbers by every way, and nothing kept that is needed."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedtune.client.body_wire import Traffic
from fedtune.errors import ExitCode, FedtuneError
from fedtune.server import body_server
from fedtune.server.body_server import Door
from fedtune.server.body_service import BodyService
from fedtune.split import body_pb2 as pb
from fedtune.split.calls import Limits, Refused, Status
from fedtune.split.codec import CODECS
from fedtune.split.rows import Rows
from tests.split import service_kit as kit
from tests.split.service_kit import ROWS, caller, link, numbers, part, same, service, train


@pytest.fixture(scope="module")
def port() -> Any:
    """Return the address of a service in this process, over sockets."""
    made = service()
    running = body_server.start(made, Door(), made.limits, sweep=made.sweep)
    yield running.address
    running.stop(0)
    made.close()


def test_both_links_and_graphs_train_alike(port: str) -> None:
    there = link(port)
    here, graphs, batches = link(service()), link(service(graphs=2)), link(service(batch=4))
    runs = [train(part(), one) for one in (there, here, graphs, batches)]
    assert all(same(runs[0], other) for other in runs[1:])
    assert there.take() == here.take() == graphs.take()
    assert there.traffic == Traffic()
    there.close()


def test_a_whole_model_steps_alike() -> None:
    model, whole = part(), kit.make("Llama")
    kit.connect(model, link(service()))
    for one in (model, whole):
        one(**kit.batch_of(0)).loss.backward()
    grads = {name: value.grad for name, value in whole.named_parameters()}
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(found) > 15
    assert all(torch.equal(value, grads[name]) for name, value in found.items())


def test_generation_over_sockets_is_the_whole_models(port: str) -> None:
    model, whole = part(), kit.make("Llama")
    over = link(port)
    kit.connect(model, over)
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for cached in (False, True):
        options = {"max_new_tokens": 5, "do_sample": False, "use_cache": cached, "pad_token_id": 0}
        assert torch.equal(model.generate(prompt, **options), whole.generate(prompt, **options))
    over.close()


def test_a_backward_alone_is_small_and_a_lost_one_is_sent_whole() -> None:
    made = service()
    over = link(made)
    hidden, grad = numbers(1), numbers(2)
    over.forward(hidden, ROWS, None, "s", grad=True)
    over.take()
    first = over.backward(hidden, ROWS, None, grad, "s")[0]
    small = over.take()
    # The input was let go with the answer: the client sends it again.
    again = over.backward(hidden, ROWS, None, grad, "s")[0]
    large = over.take()
    assert torch.equal(first, again)
    assert small.calls == 1
    assert large.calls == 2
    assert large.bytes_up > 2.5 * small.bytes_up
    direct, _ = made.body.gradients(hidden, ROWS, None, grad)
    assert torch.equal(first, direct)


def test_prefixes_get_their_gradient_with_and_without_a_graph() -> None:
    rng = torch.Generator().manual_seed(3)
    deep = torch.randn(4, 2, 2, 3, 8, generator=rng)
    rows = replace(ROWS, past=3, spans=((0, 8), (0, 6)))
    found = []
    for made in (service(), service(graphs=1)):
        over = link(made)
        out = over.forward(numbers(1), rows, deep, "s", grad=True)
        found.append((out, *over.backward(numbers(1), rows, deep, numbers(2), "s")))
    for left, right in zip(*found, strict=True):
        assert left is not None
        assert right is not None
        assert torch.equal(left, right)
    assert found[0][2] is not None
    assert found[0][2].abs().max() > 0


@pytest.mark.parametrize("codec", CODECS)
def test_codecs_are_measured_in_bytes_and_error(codec: Any, port: str) -> None:
    exact = numbers(1)
    plain = link(port, client=f"plain-{codec}").forward(exact, ROWS, None, "s", grad=False)
    over = link(port, client=f"packed-{codec}", codec=codec, rank=2)
    out = over.forward(exact, ROWS, None, "s", grad=False)
    error = float((out - plain).norm() / plain.norm())
    assert error <= {"none": 0.0, "bf16": 0.01, "int8": 0.03, "lowrank": 1.0}[codec]
    assert (error > 0) == (codec != "none")
    assert over.traffic.bytes_up < {"none": 1600, "bf16": 960, "int8": 700, "lowrank": 900}[codec]
    # The gradient is taken at what the server decoded, held or sent again.
    over.forward(exact, ROWS, None, "t", grad=True)
    first = over.backward(exact, ROWS, None, numbers(2), "t")
    assert torch.equal(first[0], over.backward(exact, ROWS, None, numbers(2), "t")[0])


def test_large_tensors_come_in_many_chunks() -> None:
    made = service(limits=Limits(chunk_bytes=1000))
    recorded = kit.Recorded(made)
    out = link(recorded).forward(numbers(1), ROWS, None, "s", grad=False)
    assert torch.equal(out, link(service()).forward(numbers(1), ROWS, None, "s", grad=False))


# ------------------------------------------------------------ repeated calls


def test_a_step_stands_for_one_call() -> None:
    over = link(service())
    first = over.forward(numbers(1), ROWS, None, "s", grad=True)
    assert torch.equal(first, over.forward(numbers(1), ROWS, None, "s", grad=True))
    with pytest.raises(FedtuneError, match="called with other numbers"):
        over.forward(numbers(9), ROWS, None, "s", grad=True)
    over.backward(numbers(1), ROWS, None, numbers(2), "s")
    with pytest.raises(FedtuneError, match="called with other numbers"):
        over.backward(numbers(1), ROWS, None, numbers(3), "s")
    with pytest.raises(FedtuneError, match="called with other numbers"):
        over.backward(numbers(4), ROWS, None, numbers(2), "s")


def test_sessions_repeat_and_lost_ones_are_asked_for() -> None:
    made = service()
    over = link(made)
    start, more = Rows(2, 5), Rows(2, 1, 5)
    over.go_on("text", numbers(1), start)
    first = over.go_on("text", numbers(2, length=1), more)
    assert torch.equal(first, over.go_on("text", numbers(2, length=1), more))
    with pytest.raises(LookupError):
        over.go_on("text", numbers(3, length=1), more)
    with pytest.raises(LookupError):
        over.go_on("other", numbers(2, length=1), more)


# ------------------------------------------------------------ released once

ONCE = Rows(2, 5, 0, ((0, 5), (0, 3)), examples=(11, 12), fresh=2)


def _again(step: int) -> torch.Tensor:
    """Return hidden states whose first two positions are other ones every step."""
    return torch.cat([numbers(100 + step, length=2), numbers(1)[:, 2:]], dim=1)


def test_an_example_is_sent_once_and_answers_stay_the_same() -> None:
    made = service()
    over = link(made, release="once")
    first = over.forward(_again(0), ONCE, None, "s0", grad=True)
    whole = over.take()
    again = over.forward(_again(0), ONCE, None, "s1", grad=True)
    less = over.take()
    assert torch.equal(first, again)
    assert whole.bytes_up - less.bytes_up >= 2 * 3 * 32 * 4
    # Real positions are those of a release each time; padding does not matter to them.
    each = link(made, client="bob").forward(_again(0), ROWS, None, "s", grad=False)
    assert torch.equal(first[0], each[0])
    assert torch.allclose(first[1, :3], each[1, :3], atol=1e-6)
    at_hidden, _ = over.backward(_again(0), ONCE, None, numbers(2), "s1")
    assert at_hidden[:, :2].abs().max() > 0
    assert at_hidden[:, 2:].abs().max() == 0
    lost, _ = over.backward(_again(0), ONCE, None, numbers(2), "s1")
    assert torch.equal(at_hidden, lost)


def test_an_example_is_found_in_another_batch_with_other_padding() -> None:
    over = link(service(), release="once")
    first = over.forward(_again(0), ONCE, None, "s0", grad=False)
    over.take()
    alone = Rows(1, 3, 0, ((0, 3),), examples=(12,), fresh=2)
    short = over.forward(_again(0)[1:, :3], alone, None, "s1", grad=False)
    assert over.take().calls == 1
    assert torch.allclose(short, first[1:, :3], atol=1e-5)


def test_nothing_is_sent_of_an_example_without_prompts() -> None:
    over = link(service(), release="once")
    rows = replace(ONCE, fresh=0)
    first = over.forward(numbers(1), rows, None, "s0", grad=False)
    over.take()
    assert torch.equal(first, over.forward(numbers(1), rows, None, "s1", grad=False))
    assert over.take().bytes_up < 300


def test_what_is_held_is_ciphertext_and_needs_the_key() -> None:
    made = service()
    secret = bytes(range(32))
    link(made, release="once", secret=secret).forward(_again(0), ONCE, None, "s0", grad=False)
    held = [value[0] for value in made.released.shelf._found.values()]
    plain = numbers(1)[0, 2:].contiguous().numpy().tobytes()
    assert len(held) == 2
    assert all(plain[i : i + 8] not in one.data for one in held for i in range(0, len(plain), 8))
    assert all(secret not in repr(key).encode() for key in made.released.shelf._found)
    whole = made.released.get("run-1", "ann", secret, 11)
    assert whole is not None
    assert whole.numpy().tobytes() == plain
    assert made.released.get("run-1", "ann", bytes(32), 11) is None
    assert made.released.get("run-1", "bob", secret, 11) is None
    # A client that believes it was held, but has another key, sends all of it.
    other = link(made, release="once")
    other._released.update(ONCE.examples or ())
    other.take()
    other.forward(_again(0), ONCE, None, "s1", grad=False)
    assert other.take().calls == 2


def test_what_is_held_expires() -> None:
    made = service(limits=Limits(keep_seconds=1))
    over = link(made, release="once")
    assert over.limits.keep_seconds == 1
    over.forward(_again(0), ONCE, None, "s0", grad=False)
    assert len(made.released.shelf) == 2
    time.sleep(1.1)
    made.sweep()
    assert len(made.released.shelf) == 0
    assert made.released.shelf.size == 0
    over.take()
    over.forward(_again(0), ONCE, None, "s1", grad=False)
    assert over.take().calls == 2


# ------------------------------------------------------------ many clients


def test_calls_of_one_shape_are_joined() -> None:
    made = service(batch=4)
    alone = [link(service()).forward(numbers(i), ROWS, None, "s", grad=False) for i in range(4)]
    found: dict[int, torch.Tensor] = {}
    release = threading.Event()
    blocker = threading.Thread(target=made.compute.call, args=(release.wait,))
    blocker.start()

    def ask(index: int) -> None:
        one = link(made, client=f"c{index}")
        found[index] = one.forward(numbers(index), ROWS, None, "s", grad=False)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    release.set()
    for thread in [*threads, blocker]:
        thread.join()
    assert made.compute.largest == 4
    assert all(torch.allclose(found[i], alone[i], atol=1e-5) for i in range(4))


def test_a_client_has_so_many_credits_and_others_have_theirs() -> None:
    made = service(limits=Limits(credits=1))
    release = threading.Event()
    blocker = threading.Thread(target=made.compute.call, args=(release.wait,))
    blocker.start()
    first = threading.Thread(
        target=lambda: link(made).forward(numbers(1), ROWS, None, "a", grad=False)
    )
    first.start()
    time.sleep(0.2)
    with pytest.raises(FedtuneError, match="1 calls in flight") as caught:
        link(made, patience=0.3).forward(numbers(1), ROWS, None, "b", grad=False)
    assert caught.value.code == ExitCode.ENGINE
    waiting = threading.Thread(
        target=lambda: link(made, client="bob").forward(numbers(1), ROWS, None, "b", grad=False)
    )
    waiting.start()
    time.sleep(0.2)
    assert made._flying == {"ann": 1, "bob": 1}
    release.set()
    for thread in (first, waiting, blocker):
        thread.join()
    assert made._flying == {}
    assert made._bytes == 0


def test_bytes_in_flight_are_bounded() -> None:
    made = service(limits=Limits(flight_bytes=4000))
    with made._room("bob", 3000), pytest.raises(FedtuneError, match="bytes are in flight"):
        link(made, patience=0.3).forward(numbers(1), ROWS, None, "a", grad=False)
    link(made).forward(numbers(1), ROWS, None, "a", grad=False)


def test_inputs_are_held_by_bytes_and_graphs_by_number() -> None:
    size = numbers(1).numel() * 4
    made = service(limits=Limits(held_bytes=3 * size), graphs=2)
    over = link(made)
    for step in range(10):
        over.forward(numbers(step), ROWS, None, f"s{step}", grad=True)
    assert len(made.inputs) == 3
    assert len(made.graphs) == 2
    assert made.inputs.size == 3 * size


# ------------------------------------------------------------ what is refused


def _header(**changes: Any) -> pb.Header:
    rows = pb.Rows(batch=2, length=5)
    base: dict[str, Any] = {
        "run": "run-1", "client": "eve", "step": "s", "part": pb.FORWARD, "model": kit.DIGEST,
        "cut": pb.Cut(head=1, tail=1, count=4), "rows": rows,
    }  # fmt: skip
    return pb.Header(**(base | changes))


def _ask(made: BodyService, header: pb.Header, tensors: Any, name: Any = pb.HIDDEN) -> Any:
    from fedtune.split.frames import frames, seal

    sealed = [seal(name, tensors)] if isinstance(tensors, torch.Tensor) else tensors
    return list(made.call(header.part, frames(header, sealed, 1 << 20)))


BAD = {
    "another model": ({"model": "other"}, Status.FAILED_PRECONDITION),
    "another cut": ({"cut": pb.Cut(head=2, tail=1, count=4)}, Status.FAILED_PRECONDITION),
    "another codec": ({"codec": 9}, Status.FAILED_PRECONDITION),
    "a text as name": ({"client": "two words"}, Status.INVALID_ARGUMENT),
    "a long name": ({"step": "s" * 81}, Status.INVALID_ARGUMENT),
    "no rows": ({"rows": pb.Rows()}, Status.INVALID_ARGUMENT),
    "tokens as lengths": (
        {"rows": pb.Rows(batch=2, length=5, masked=True, starts=[0, 0], ends=[5, 4711])},
        Status.INVALID_ARGUMENT,
    ),
    "lengths of three": (
        {"rows": pb.Rows(batch=2, length=5, masked=True, starts=[0] * 3, ends=[5] * 3)},
        Status.INVALID_ARGUMENT,
    ),
    "a past that was not sent": ({"rows": pb.Rows(batch=2, length=5, past=3)},
                                 Status.INVALID_ARGUMENT),
    "another part": ({"part": pb.BACKWARD}, Status.NOT_FOUND),
    "a short key": (
        {"rows": pb.Rows(batch=2, length=5, examples=[1, 2]), "release": pb.ONCE, "key": b"k"},
        Status.INVALID_ARGUMENT,
    ),
    "names that nobody asked for": (
        {"rows": pb.Rows(batch=2, length=5, examples=[4711, 42])}, Status.INVALID_ARGUMENT,
    ),
    "endless rows": ({"rows": pb.Rows(batch=2, length=1 << 30)}, Status.OUT_OF_RANGE),
    "too many rows": ({"rows": pb.Rows(batch=1 << 30, length=5)}, Status.OUT_OF_RANGE),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_calls_that_do_not_fit_are_refused(what: str) -> None:
    made = service()
    changes, status = BAD[what]
    with pytest.raises(Refused) as caught:
        _ask(made, _header(**changes), [] if "key" in changes else numbers(1))
    assert caught.value.status == status
    assert made._bytes == 0
    assert made._flying == {}


def test_tensors_that_do_not_fit_are_refused() -> None:
    made = service(limits=Limits(tensor_bytes=4096))
    nan, inf = numbers(1), numbers(1)
    nan[1, 2, 3], inf[0, 0, 0] = torch.nan, torch.inf
    bad: list[tuple[Any, Any, Status]] = [
        (nan, pb.HIDDEN, Status.INVALID_ARGUMENT),
        (inf, pb.HIDDEN, Status.INVALID_ARGUMENT),
        (numbers(1).half(), pb.HIDDEN, Status.INVALID_ARGUMENT),
        (numbers(1).bfloat16(), pb.HIDDEN, Status.INVALID_ARGUMENT),
        (numbers(1)[:, :4], pb.HIDDEN, Status.INVALID_ARGUMENT),
        (numbers(1)[..., :31], pb.HIDDEN, Status.INVALID_ARGUMENT),
        (numbers(1), pb.OUTPUT, Status.INVALID_ARGUMENT),
        (numbers(1), pb.DEEP, Status.INVALID_ARGUMENT),
        (numbers(1), pb.GRAD, Status.INVALID_ARGUMENT),
        (numbers(1, 2, 50), pb.HIDDEN, Status.OUT_OF_RANGE),
    ]
    for tensor, name, status in bad:
        with pytest.raises(Refused) as caught:
            _ask(made, _header(), tensor, name)
        assert caught.value.status == status, (tensor.shape, name, caught.value)
    _ask(made, _header(), numbers(1))


def test_bytes_that_do_not_fit_are_refused() -> None:
    from fedtune.split.frames import frames, seal

    made = service()

    def chunks(**changes: Any) -> list[pb.Chunk]:
        found = list(frames(_header(**changes), [seal(pb.HIDDEN, numbers(1))], 600))
        assert len(found) == 4
        return found

    def refused(sent: list[pb.Chunk]) -> Status:
        with pytest.raises(Refused) as caught:
            list(made.call(pb.FORWARD, sent))
        return caught.value.status

    assert refused([]) == Status.INVALID_ARGUMENT
    assert refused(chunks()[1:]) == Status.INVALID_ARGUMENT
    assert refused(chunks()[:-1]) == Status.INVALID_ARGUMENT
    assert refused([*chunks(), chunks()[1]]) == Status.OUT_OF_RANGE
    assert refused([*chunks(), pb.Chunk(header=_header())]) == Status.INVALID_ARGUMENT
    swapped = chunks()
    swapped[1], swapped[2] = swapped[2], swapped[1]
    assert refused(swapped) == Status.DATA_LOSS
    flipped = chunks()
    flipped[1].data = b"\0" + flipped[1].data[1:]
    assert refused(flipped) == Status.DATA_LOSS
    claims = chunks()
    claims[0].header.tensors[0].pieces[0].shape[0] = 1 << 31
    assert refused(claims) == Status.OUT_OF_RANGE
    list(made.call(pb.FORWARD, chunks()))


def test_refusals_reach_the_client_and_disturb_nobody(port: str) -> None:
    good = link(port, client="good")
    before = good.forward(numbers(1), ROWS, None, "s", grad=False)
    start = time.monotonic()
    for changes, words in (({"digest": "other"}, "model"), ({"cut": kit.Cut(2, 1, 4)}, "cuts")):
        with pytest.raises(FedtuneError, match=words) as caught:
            kit.open_link(port, caller("eve", **changes))
        assert caught.value.code == ExitCode.MODEL
        assert caught.value.hint
    over = link(port, client="eve")
    nan = numbers(1)
    nan[0, 0, 0] = torch.nan
    with pytest.raises(FedtuneError, match="not finite"):
        over.forward(nan, ROWS, None, "s", grad=False)
    with pytest.raises(FedtuneError, match="dtype"):
        over.forward(numbers(1).half(), ROWS, None, "s", grad=False)
    with pytest.raises(FedtuneError, match="at the cut"):
        over.forward(numbers(1).double(), ROWS, None, "s", grad=False)
    # Refusals that no waiting mends are not waited for.
    assert time.monotonic() - start < 2
    assert torch.equal(before, good.forward(numbers(1), ROWS, None, "t", grad=False))
    for one in (good, over):
        one.close()


def test_patience_ends_with_an_error_that_helps() -> None:
    start = time.monotonic()
    with pytest.raises(FedtuneError, match=r"no answer in 0\.5 s") as caught:
        link("127.0.0.1:9", patience=0.5)
    assert time.monotonic() - start < 3
    assert caught.value.code == ExitCode.ENGINE
    assert "fedtune body" in caught.value.hint


def test_a_slow_answer_is_waited_for_again() -> None:
    made = service()
    running = body_server.start(made, Door(), made.limits)
    over = link(running.address, deadline=0.2)
    release = threading.Event()
    blocker = threading.Thread(target=made.compute.call, args=(release.wait,))
    blocker.start()
    threading.Timer(1.0, release.set).start()
    out = over.forward(numbers(1), ROWS, None, "s", grad=False)
    assert over.traffic.calls > 3
    assert torch.equal(out, link(made).forward(numbers(1), ROWS, None, "s", grad=False))
    blocker.join()
    running.stop(0)


def test_a_restarted_server_is_found_again() -> None:
    made = service()
    running = body_server.start(made, Door(), made.limits)
    over = link(running.address)
    first = over.forward(numbers(1), ROWS, None, "s", grad=True)
    running.stop(0)
    fresh = service()
    again = body_server.start(fresh, Door(listen=running.address), fresh.limits)
    at_hidden, _ = over.backward(numbers(1), ROWS, None, numbers(2), "s")
    assert torch.equal(first, over.forward(numbers(1), ROWS, None, "s", grad=False))
    assert torch.equal(at_hidden, made.body.gradients(numbers(1), ROWS, None, numbers(2))[0])
    with pytest.raises(FedtuneError, match="listened"):
        body_server.start(fresh, Door(listen=again.address), fresh.limits)
    again.stop(0)


def test_an_open_door_must_be_asked_for() -> None:
    made = service()
    with pytest.raises(FedtuneError, match="without --enrolled and --cert") as caught:
        body_server.start(made, Door(listen="0.0.0.0:0"), made.limits)
    assert caught.value.code == ExitCode.USAGE
    body_server.start(made, Door(listen="0.0.0.0:0", insecure=True), made.limits).stop(0)
    with pytest.raises(FedtuneError, match="without TLS"):
        link("192.0.2.1:1")

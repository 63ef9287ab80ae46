"""What the cut costs: the body in another process, over gRPC on loopback.

A Llama with random weights, cut after its first and before its last block; both ends are
tuned with AdamW, the body is frozen. Run it with::

    python -m fedtune.simulations.benchmarks.split [--quick]

* ``cut_overhead``: a step with the body behind gRPC beside the same step with the body called
  directly in this process, as a share of the former: serialisation, copies, hashes, sockets.
  Both compute the same, the second forward pass of a stateless backward call included. The
  variants take turns; shares are medians of the shares within a turn. ``cut_overhead_cpu`` is
  the same of the processors' time of both processes, which a busy machine disturbs less.
* ``recompute_overhead`` is what that second forward pass costs over the whole model, as a
  share, and ``graphs_overhead`` what is left over the whole model when the server holds graphs.
* Tokens per second of 1, 2 and 8 clients, threads of one process, against the whole model in
  one process; all share this machine's cores with the server.
* The server's resident memory over 1,000 steps of a tiny model, after 200 to warm up.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

__all__ = ["Size", "main"]

DIGEST = "benchmark"
HEAD = TAIL = 1
MB = 1 << 20


@dataclass(frozen=True)
class Size:
    """Shape of the model and of a batch, and threads of torch; as it stands, 103 M parameters."""

    layers: int = 11
    hidden: int = 768
    inner: int = 2048
    vocabulary: int = 32000
    rows: int = 16
    length: int = 128
    threads: int = 2


MANY = Size(layers=8, hidden=384, inner=1024, vocabulary=4096, rows=4)
TINY = Size(layers=4, hidden=64, inner=128, vocabulary=256, rows=4, length=32, threads=1)


def network(size: Size) -> nn.Module:
    """Return the model, its weights random and the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(1, size.hidden // 64)
    shape = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.inner,
        num_hidden_layers=size.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=size.length, pad_token_id=0, use_cache=False,
        tie_word_embeddings=True,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(shape).eval()
    return model


def cut_for(model: nn.Module) -> Any:
    """Return where it is cut."""
    from fedtune.split.blocks import cut_of

    return cut_of(model, HEAD, TAIL)


def serve(size: Size, graphs: Sequence[int], pipe: Connection) -> None:
    """Run body servers, each with so many graphs, until the pipe closes: the other process."""
    from fedtune.server.body import Body
    from fedtune.server.body_server import Door, start
    from fedtune.server.body_service import BodyService

    torch.set_num_threads(size.threads)
    model = network(size)
    body = Body(model, cut_for(model))
    services = [BodyService(body, DIGEST, graphs=many) for many in graphs]
    running = [start(one, Door(), one.limits, sweep=one.sweep) for one in services]
    pipe.send([one.address for one in running])
    with pipe, suppress(EOFError):
        pipe.recv()
    for one in running:
        one.stop()


@contextmanager
def body_of(size: Size, graphs: Sequence[int] = (0,)) -> Iterator[tuple[list[str], int]]:
    """Yield the addresses and the process id of body servers of one process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=serve, args=(size, graphs, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        yield ours.recv(), int(child.pid or 0)
    finally:
        ours.close()
        child.join(30)


class Direct:
    """A link without any: the body is called."""

    def __init__(self, body: Any) -> None:
        self.body = body

    def forward(
        self, hidden: torch.Tensor, rows: Any, deep: Any, _step: str, *, grad: bool
    ) -> torch.Tensor:
        """Run the body."""
        del grad
        with torch.no_grad():
            out: torch.Tensor = self.body.forward(hidden, rows, deep).clone()
        return out

    def backward(
        self, hidden: torch.Tensor, rows: Any, deep: Any, grad: torch.Tensor, _step: str
    ) -> Any:
        """Run it again, and back."""
        return self.body.gradients(hidden, rows, deep, grad)

    def go_on(self, session: str, hidden: torch.Tensor, rows: Any) -> torch.Tensor:
        """Is not measured here."""
        raise LookupError(session)


def step_of(model: nn.Module, size: Size, link: Any = None, seed: int = 1) -> Callable[[], float]:
    """Return a function that makes one step of both ends and returns its seconds.

    Without a link the model is whole, and its body frozen.
    """
    from fedtune.client.remote import connect, keep_ends
    from fedtune.split.blocks import blocks_of

    cut = cut_for(model)
    if link is not None:
        keep_ends(model, cut)
        connect(model, link)
    model.requires_grad_(False)
    blocks = blocks_of(model).modules
    for block in (blocks[0], blocks[cut.count - 1]):
        block.requires_grad_(True)
    tuned = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr=1e-4)
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, size.vocabulary, (size.rows, size.length), generator=rng)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def reach(address: str, model: nn.Module, client: str = "client") -> Any:
    """Return a link to a body server."""
    from fedtune.client.body_link import Caller, open_link

    return open_link(address, Caller("benchmark", client, DIGEST, cut_for(model)))


@dataclass(frozen=True)
class Found:
    """Seconds on the wall and of the processors of each variant's steps; bytes of a step."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    parameters: int
    moved: int


def overhead(size: Size, turns: int) -> Found:
    """Let the variants take turns."""
    from fedtune.server.body import Body

    torch.set_num_threads(size.threads)
    with body_of(size, (0, 2)) as (addresses, pid):
        whole = network(size)
        count = sum(value.numel() for value in whole.parameters())
        links = [reach(address, whole) for address in addresses]
        far = copy.deepcopy(whole)
        body = Body(far, cut_for(far))
        body.model.requires_grad_(False)
        steps = {
            "body over gRPC": step_of(copy.deepcopy(whole), size, links[0]),
            "body called": step_of(copy.deepcopy(whole), size, Direct(body)),
            "over gRPC, graphs held": step_of(copy.deepcopy(whole), size, links[1]),
            "whole model": step_of(whole, size),
        }
        for step in steps.values():
            step()
        links[0].take()
        wall: dict[str, list[float]] = {name: [] for name in steps}
        cpu: dict[str, list[float]] = {name: [] for name in steps}
        both = (psutil.Process(), psutil.Process(pid))

        def spent() -> float:
            times = [process.cpu_times() for process in both]
            return sum(float(one.user + one.system) for one in times)

        for turn in range(turns):
            for name in list(steps)[:: -1 if turn % 2 else 1]:
                before = spent()
                wall[name].append(steps[name]())
                cpu[name].append(spent() - before)
        moved = links[0].take()
        return Found(wall, cpu, count, (moved.bytes_up + moved.bytes_down) // turns)


def speeds(size: Size, clients: Sequence[int], seconds: float) -> dict[str, float]:
    """Return tokens per second of so many clients together, and of the whole model."""
    torch.set_num_threads(size.threads)
    tokens = size.rows * size.length
    model = network(size)
    whole = step_of(copy.deepcopy(model), size)
    whole()
    spent: list[float] = []
    while sum(spent) < seconds:
        spent.append(whole())
    found = {"whole": tokens * len(spent) / sum(spent)}
    with body_of(size) as ((address,), _):
        for many in clients:
            torch.set_num_threads(max(1, size.threads // many))
            models = [copy.deepcopy(model) for _ in range(many)]
            links = [reach(address, model, f"c{i}") for i, model in enumerate(models)]
            steps = [
                step_of(model, size, link, i)
                for i, (model, link) in enumerate(zip(models, links, strict=True))
            ]
            found[str(many)] = tokens * _together(steps, seconds)
            for link in links:
                link.close()
    return found


def _together(steps: Sequence[Callable[[], float]], seconds: float) -> float:
    """Return steps per second, of all together, while all of them are at work."""
    started = threading.Barrier(len(steps) + 1)
    ended = threading.Event()
    ends: list[float] = []

    def work(step: Callable[[], float]) -> None:
        step()
        started.wait()
        while not ended.is_set():
            step()
            ends.append(time.perf_counter())

    threads = [threading.Thread(target=work, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    started.wait()
    start = time.perf_counter()
    # Short steps of many clients in turns need a few rounds to count.
    while time.perf_counter() - start < seconds or len(ends) < 2 * len(steps):
        time.sleep(0.02)
    ended.set()
    until = time.perf_counter()
    done = sum(end <= until for end in ends)
    for thread in threads:
        thread.join()
    return done / (until - start)


def memory(steps: int, warm: int) -> dict[str, float]:
    """Return how a server's resident memory changes over the steps of a client, in MB."""
    torch.set_num_threads(TINY.threads)
    with body_of(TINY) as ((address,), pid):
        model = network(TINY)
        step = step_of(model, TINY, reach(address, model))
        server = psutil.Process(pid)
        held: list[float] = []
        for done in range(warm + steps):
            step()
            if done >= warm and done % 10 == 0:
                held.append(server.memory_info().rss / MB)
    slope = float(np.polyfit(np.arange(len(held)) * 10, held, 1)[0])
    tenth = max(1, len(held) // 10)
    return {
        "growth": statistics.median(held[-tenth:]) - statistics.median(held[:tenth]),
        "slope_per_1000": 1000 * slope,
        "range": max(held) - min(held),
        "resident": held[-1],
    }


def share(upper: Sequence[float], lower: Sequence[float]) -> float:
    """Return the median over turns of the share of ``upper`` that ``lower`` does not take."""
    return statistics.median((a - b) / a for a, b in zip(upper, lower, strict=True))


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its tables and its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller batches: within a minute")
    parser.add_argument("--turns", type=int, default=0, help="steps of each variant")
    parser.add_argument("--threads", type=int, default=2, help="1 on a busy machine")
    options = parser.parse_args(arguments)
    size = replace(Size(rows=2) if options.quick else Size(), threads=options.threads)
    found = overhead(size, options.turns or (3 if options.quick else 7))
    wall, cpu = found.wall, found.cpu
    through, whole = wall["body over gRPC"], wall["whole model"]
    table = Table(
        title=f"one step, {found.parameters / 1e6:.0f} M parameters, "
        f"{size.rows} x {size.length} tokens, {size.threads} threads, "
        f"{found.moved / MB:.1f} MB on the wire, {len(through)} turns"
    )
    for name in ("step", "s", "gRPC's share over it", "CPU s", "gRPC's share over it"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for name, seconds in wall.items():
        table.add_row(
            name,
            f"{statistics.median(seconds):.3f}",
            f"{share(through, seconds):.3f}",
            f"{statistics.median(cpu[name]):.3f}",
            f"{share(cpu['body over gRPC'], cpu[name]):.3f}",
        )
    Console().print(table)

    many = replace(MANY, threads=options.threads, rows=1 if options.quick else MANY.rows)
    rates = speeds(many, (1, 2, 8), 0.5 if options.quick else 15.0)
    table = Table(title=f"tokens per second, batches of {many.rows} x {many.length}")
    for name in rates:
        table.add_column("whole model" if name == "whole" else f"{name} clients", justify="right")
    table.add_row(*(f"{rate:,.0f}" for rate in rates.values()))
    Console().print(table)

    steps = 60 if options.quick else 1000
    held = memory(steps, 30 if options.quick else 200)
    Console().print(
        f"server memory over {steps} steps: {held['resident']:.0f} MB, "
        f"{held['growth']:+.2f} MB from the first tenth to the last, "
        f"{held['slope_per_1000']:+.2f} MB per 1,000 steps, range {held['range']:.2f} MB"
    )
    result = {
        "parameters": found.parameters,
        "step_bytes": found.moved,
        "cut_overhead": share(through, wall["body called"]),
        "cut_overhead_cpu": share(cpu["body over gRPC"], cpu["body called"]),
        "recompute_overhead": share(wall["body called"], whole),
        "graphs_overhead": share(wall["over gRPC, graphs held"], whole),
        **{f"tokens_per_second_{name}": rates[name] for name in ("1", "2", "8")},
        "whole_tokens_per_second": rates["whole"],
        "server_memory_growth_mb": held["growth"],
        "server_memory_slope_mb": held["slope_per_1000"],
        "server_memory_range_mb": held["range"],
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

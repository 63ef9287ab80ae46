"""What the tests of the body's service share: a tiny service, its clients, a training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fedtune.client.body_link import Caller, Link, LinkSettings, open_link
from fedtune.client.remote import connect, keep_ends
from fedtune.server.body import Body
from fedtune.server.body_service import BodyService
from fedtune.split import body_pb2 as pb
from fedtune.split.blocks import Cut, cut_of
from fedtune.split.rows import Rows
from tests.split.zoo import make

DIGEST = "0123abcd"
WIDTH = 32
CUT = Cut(1, 1, 4)

torch.set_num_threads(1)


def service(**options: Any) -> BodyService:
    """Return the service of a tiny Llama's body."""
    return BodyService(Body(make("Llama"), CUT), DIGEST, **options)


def part() -> nn.Module:
    """Return the client's part of the same Llama."""
    model = make("Llama")
    keep_ends(model, cut_of(model, 1, 1))
    return model


def caller(client: str = "ann", **changes: Any) -> Caller:
    return Caller(**{"run": "run-1", "client": client, "digest": DIGEST, "cut": CUT} | changes)


def link(target: Any, client: str = "ann", **settings: Any) -> Link:
    return open_link(target, caller(client), LinkSettings(**{"patience": 5.0} | settings))


def numbers(seed: int, batch: int = 2, length: int = 5) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, generator=rng)


ROWS = Rows(2, 5, 0, ((0, 5), (0, 3)))


def batch_of(seed: int, rows: int = 3, length: int = 10) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (rows, length), generator=rng)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[2, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(
    model: nn.Module, target: Any, steps: int = 6, before: Callable[[int], None] = int
) -> dict[str, torch.Tensor]:
    """Tune the ends for some steps through a link; return what was tuned."""
    if isinstance(target, Link):
        connect(model, target)
    tuned = {n: p for n, p in model.named_parameters() if "norm" in n or "q_proj" in n}
    model.requires_grad_(False)
    for value in tuned.values():
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(tuned.values(), lr=1e-2)
    for step in range(steps):
        before(step)
        optimizer.zero_grad()
        model(**batch_of(step)).loss.backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in tuned.items()}


class Recorded:
    """A service that keeps a copy of every byte that comes in."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.bytes = b""
        self.parts: list[int] = []

    def open(self, request: pb.OpenRequest) -> pb.OpenReply:
        self.bytes += request.SerializeToString()
        return self.inner.open(request)  # type: ignore[no-any-return]

    def call(
        self, part: pb.Part, chunks: Iterable[pb.Chunk], seconds: float | None = None
    ) -> Iterator[pb.Chunk]:
        self.parts.append(part)

        def copied() -> Iterator[pb.Chunk]:
            for chunk in chunks:
                self.bytes += chunk.SerializeToString()
                yield chunk

        yield from self.inner.call(part, copied(), seconds)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)

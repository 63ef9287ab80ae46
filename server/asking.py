"""One task to many clients: the same for all, or with what each of them still lacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from fedtune.adapters import Tensors
from fedtune.server.checkpoint import State
from fedtune.server.link import Answer, Link
from fedtune.server.seeded import tensors_for
from fedtune.server.tuned import Tuned
from fedtune.wire import Evaluation, Hello, Task, Update

__all__ = ["Epochs", "Member", "ask_members", "model_for"]

_Reply = TypeVar("_Reply", Update, Evaluation)


@dataclass(frozen=True)
class Member:
    """A client of the federation and the node that speaks for it."""

    client: str
    node: int
    rows: int
    epochs: int = 0

    @classmethod
    def of(cls, hello: Hello, node: int) -> Member:
        """Return who said hello."""
        return cls(hello.client, node, hello.rows, hello.epochs)


@dataclass
class Epochs:
    """How many folded pools each client has, as far as the server knows."""

    known: dict[str, int]

    @classmethod
    def at(cls, members: Sequence[Member], state: State | None) -> Epochs:
        """Return what members said; what a server has taken back does not count."""
        most = state.chain.epoch if state and state.chain else 0
        return cls({member.client: min(member.epochs, most) for member in members})

    def of(self, member: Member) -> int:
        """Return what a client said at first, or showed since."""
        return self.known[member.client]

    def heard(self, client: str, epoch: int, *, well: bool) -> None:
        """Note an answer: who answered well has them all; who failed may lack any."""
        self.known[client] = epoch if well else 0


def model_for(
    tuned: Tuned, state: State, members: Iterable[Member], epochs: Epochs
) -> dict[str, Tensors]:
    """Return the tensors of ``state`` that each client is sent; equal ones are one object.

    Where only coefficients travel, a client gets the folded pools that it lacks beside them:
    one vector each.
    """
    if tuned.weights is None:
        return dict.fromkeys((member.client for member in members), state.tensors())
    most = state.chain.epoch if state.chain else 0
    known = {member.client: min(epochs.of(member), most) for member in members}
    found = tensors_for(tuned.config, tuned.weights, state, known.values())
    return {client: found[count] for client, count in known.items()}


def ask_members(
    link: Link, reply: type[_Reply], tuned: Tuned, state: State, members: Sequence[Member],
    task: Task, epochs: Epochs, more: Tensors | None = None,
) -> tuple[dict[int, int], Iterator[Answer[_Reply]]]:  # fmt: skip
    """Send ``task`` with the tensors of ``state``; return bytes for each node, and the answers.

    Parameters
    ----------
    more : Tensors, optional
        What travels beside them: the clients' clipping policy.
    """
    sent = model_for(tuned, state, members, epochs)
    # Equal tasks are one object too: the link encodes it once.
    wholes = {id(some): replace(task, tensors=some | (more or {})) for some in sent.values()}
    tasks: dict[int, Task | None] = {one.node: wholes[id(sent[one.client])] for one in members}
    return link.ask_each(reply, tasks, tuned.config.federation.deadline)

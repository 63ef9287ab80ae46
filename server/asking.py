"""One task to many clients: the same for all, or with what each of them still lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from fedtune.server.checkpoint import State
from fedtune.server.learner import open_learner
from fedtune.server.link import Answer, Link
from fedtune.server.seeded import tensors_for
from fedtune.server.tuned import Tuned
from fedtune.wire import Evaluation, Hello, Task, Update

__all__ = ["Epochs", "Member", "ask_members"]

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


def ask_members(
    link: Link, reply: type[_Reply], tuned: Tuned, state: State, members: Sequence[Member],
    task: Task, epochs: Epochs,
) -> tuple[dict[int, int], Iterator[Answer[_Reply]]]:  # fmt: skip
    """Send ``task`` with the tensors of ``state``; return bytes for each node, and the answers.

    Where only coefficients travel, a client gets the folded pools that it lacks beside them:
    one vector each.
    """
    most = state.chain.epoch if state.chain else 0
    known = {member.node: min(epochs.of(member), most) for member in members}
    if tuned.weights is None:
        learner = open_learner(tuned.config) if reply is Update else None
        tensors = {0: state.tensors() | (learner.told(state.learner) if learner else {})}
    else:
        tensors = tensors_for(tuned.config, tuned.weights, state, known.values())
    wholes = {count: replace(task, tensors=some) for count, some in tensors.items()}
    tasks: dict[int, Task | None] = {node: wholes[count] for node, count in known.items()}
    return link.ask_each(reply, tasks, tuned.config.federation.deadline)

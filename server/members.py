"""Who takes part: nodes that said who they are, and the cohort of a round."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.seeds import derive
from fedtune.server.asking import Epochs, Member
from fedtune.server.events import ClientDone, Watcher
from fedtune.server.link import Link, plain
from fedtune.server.tuned import Tuned
from fedtune.wire import BUDGET, Hello, Task

__all__ = ["Roll", "cohort_of", "gather"]


def gather(
    link: Link, tuned: Tuned, watch: Watcher, begun: Task | None = None
) -> tuple[Member, ...]:
    """Ask every node who it is; return members sorted by client name.

    A node that fails, holds another base model, or takes a name that another node
    has, is left out, and ``watch`` hears why. ``begun`` says which job it is and how far:
    a client may refuse a plan that its owner's cap does not allow.
    """
    members, problems = _asked(link, tuned, link.nodes(), begun)
    for client, reason in problems.items():
        watch(ClientDone(0, client, "failed", reason, 0))
    if not members and problems and all(BUDGET in reason for reason in problems.values()):
        raise FedtuneError(
            f"no client's budget allows this run: {next(iter(problems.values()))}",
            hint="fewer rounds or more noise; or the owners decide: fedtune budget set",
            code=ExitCode.BUDGET_EXHAUSTED,
        )
    if not members:
        shown = [f"{client}: {reason}" for client, reason in problems.items()]
        raise FedtuneError(
            f"no client can take part: {shown[0] if shown else 'no node answered'}",
            hint="check data and model at the clients",
            code=ExitCode.QUORUM,
        )
    return tuple(members[name] for name in sorted(members))


def cohort_of(
    members: tuple[Member, ...], config: Config, number: int, attempt: int
) -> list[Member]:
    """Draw a round's cohort without replacement; the same seed draws the same."""
    share = config.federation.cohort
    wanted = round(share * len(members)) if share <= 1 else round(share)
    size = min(max(1, wanted), len(members))
    if size == len(members):
        return list(members)
    rng = np.random.default_rng(derive(config.seed, "cohort", number, attempt))
    drawn = rng.choice(len(members), size=size, replace=False)
    return [members[i] for i in sorted(drawn)]


@dataclass
class Roll:
    """Everybody who ever said hello in this run, and who of them is there now."""

    known: dict[str, Member]

    @classmethod
    def of(cls, members: tuple[Member, ...]) -> Roll:
        """Return the roll that begins with these."""
        return cls({member.client: member for member in members})

    def present(
        self, link: Link, tuned: Tuned, watch: Watcher, begun: Task, epochs: Epochs
    ) -> tuple[Member, ...]:
        """Return the members that are there, after a welcome to nodes that came since.

        In a simulation all are always there, and nothing is asked.
        """
        nodes = set(link.nodes())
        fresh = sorted(nodes - {member.node for member in self.known.values()})
        if fresh:
            found, problems = _asked(link, tuned, fresh, begun)
            for client, reason in problems.items():
                watch(ClientDone(begun.round + 1, client, "failed", reason, 0))
            self.known |= found
            epochs.known |= dict.fromkeys(found, 0)
        here = {name: member for name, member in self.known.items() if member.node in nodes}
        return tuple(here[name] for name in sorted(here))


def _asked(
    link: Link, tuned: Tuned, nodes: list[int], begun: Task | None
) -> tuple[dict[str, Member], dict[str, str]]:
    """Ask nodes who they are; return members, and why others are none."""
    _, answers = link.ask(Hello, nodes, begun, tuned.config.federation.deadline)
    members: dict[str, Member] = {}
    problems: dict[str, str] = {}
    for answer in sorted(answers, key=lambda one: one.node):
        hello = answer.value
        if hello is None:
            problems[f"node {answer.node}"] = answer.problem
        elif not hello.client or plain(hello.client) != hello.client:
            problems[f"node {answer.node}"] = f"its name cannot be shown: {plain(hello.client)}"
        elif hello.fingerprint != tuned.fingerprint:
            problems[hello.client] = "holds another base model than the server"
        elif hello.client in members:
            problems[hello.client] = f"node {answer.node} takes a name that is taken"
        else:
            members[hello.client] = Member.of(hello, answer.node)
    return members, problems

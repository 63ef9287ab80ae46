"""A run over real nodes, inside Flower's ServerApp: who may speak, on which terms.

Flower lets in whoever has an enrolled key. Here a node is heard under its enrolled name
alone, and takes part once its owner's policy has accepted the experiment's terms.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.serverapp import Grid

from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import Fresh
from fedtune.keys.node import public_line
from fedtune.keys.roster import logins, read_roster, signers
from fedtune.server.app import Outcome, concluding, work
from fedtune.server.books import open_books
from fedtune.server.event_log import EVENTS, EventLog
from fedtune.server.events import ClientDone, Watcher
from fedtune.server.link import Answer, GridLink, Reply, plain
from fedtune.server.patient import Patient
from fedtune.server.run_folder import RunFolder
from fedtune.server.tuned import load_tuned
from fedtune.terms import digest_of, propose
from fedtune.wire import Accepted, Hello, Record, Terms

__all__ = ["Served", "for_owners", "run"]

_PATIENCE = 60.0
"""Seconds that a node may let others wait before it says whether it takes part."""
_AGAIN, _MOST_AGAIN = 30.0, 960.0
"""Seconds until a node that refused or said nothing is asked again, doubled each time: its owner
may have changed the policy, its model may be loaded by then; and it must not hold up others."""
_LOOK = 0.5


def for_owners(config: Config) -> Config:
    """Return an experiment as it runs over owners' machines: every owner's text is one client.

    Examples
    --------
    >>> for_owners(Config(name="ward")).privacy.dataset
    'ward'
    """
    partition = config.data.partition.model_copy(update={"by": "owner", "column": "owner"})
    data = config.data.model_copy(update={"partition": partition})
    named = {"dataset": config.privacy.dataset or config.name}
    privacy = config.privacy.model_copy(update=named)
    if config.data.kind == "classification" and not config.data.labels:
        raise FedtuneError(
            "data.labels is empty: owners' machines cannot agree on the classes by themselves",
            hint='list them in the experiment file: labels = ["negative", "positive"]',
            code=ExitCode.CONFIG,
        )
    return config.model_copy(update={"data": data, "privacy": privacy})


def run(grid: Grid, path: Path) -> None:
    """Run the experiment of a folder over Flower's grid, from its last committed round.

    Raises
    ------
    FedtuneError
        As ``work``; the folder's ``run.json`` says why.
    """
    folder, outcome = RunFolder(path), Outcome()
    config = folder.config()
    watch = EventLog(path / EVENTS).hear
    with folder.lock(), concluding(folder, outcome):
        labels = config.data.labels
        tuned = load_tuned(config, labels)
        keys = Path(config.federation.server.keys)
        terms = Terms(folder.job(), propose(config), tuned.fingerprint, {})
        link = Served(GridLink(Patient(grid)), lambda: _keys(grid), terms, config, keys, watch)
        books = open_books(config, folder.books, folder.job())
        work(
            link, config, labels, folder, watch, tuned=tuned, books=books,
            identities=lambda: signers(read_roster(keys)),
        )  # fmt: skip
    outcome.check()


@dataclass
class Served:
    """``Link`` to the nodes that are enrolled, there, and agree to the terms.

    Parameters
    ----------
    link : GridLink
    online : callable
        Returns the public key, in OpenSSH form, of every node that is there.
    terms : Terms
        Without the roster, which is read anew each time.
    config : Config
    keys : Path
        Folder with the roster, which is followed.
    watch : callable
        Hears of nodes that may not or do not want to take part.
    """

    link: GridLink
    online: Callable[[], Mapping[int, str]]
    terms: Terms
    config: Config
    keys: Path
    watch: Watcher
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _agreed: dict[int, str] = field(default_factory=dict)
    _refused: dict[int, tuple[float, str]] = field(default_factory=dict)
    _pauses: dict[int, float] = field(default_factory=dict)
    _serial: int = 0
    _begun: bool = False

    def __post_init__(self) -> None:
        self._roster = Fresh(self.keys / "roster", lambda: read_roster(self.keys))

    def nodes(self) -> list[int]:
        """Return the nodes that take part, once there are enough of them.

        Raises
        ------
        FedtuneError
            ``ExitCode.QUORUM``: not within ``federation.server.wait``.
        """
        server, end = (
            self.config.federation.server,
            self.clock() + self.config.federation.server.wait,
        )
        while True:
            here = self._here()
            if len(here) >= self._needed():
                self._begun = True
                return here
            if self.clock() > end:
                why = "; ".join(sorted({words for _, words in self._refused.values()})[:3])
                raise FedtuneError(
                    f"{len(here)} of {self._needed()} nodes take part after {server.wait:g} s"
                    + (f" ({why})" if why else ""),
                    hint="start more nodes, or lower federation.server.nodes or federation.quorum",
                    code=ExitCode.QUORUM,
                )
            self.sleep(_LOOK)

    def ask(
        self, reply: type[Reply], nodes: Iterable[int], task: Record | None, seconds: float
    ) -> tuple[int, Iterator[Answer[Reply]]]:
        """Send one task to many nodes; see ``Link``."""
        size, answers = self.link.ask(reply, nodes, task, seconds)
        return size, map(self._named, answers)

    def ask_each(
        self, reply: type[Reply], tasks: Mapping[int, Record | None], seconds: float
    ) -> tuple[dict[int, int], Iterator[Answer[Reply]]]:
        """Send each node its own task; see ``Link``."""
        sizes, answers = self.link.ask_each(reply, tasks, seconds)
        return sizes, map(self._named, answers)

    def _needed(self) -> int:
        """Return how many nodes a round needs; the first one, all that were asked for."""
        federation = self.config.federation
        least = federation.secure.min_cohort if federation.secure else 1
        if not self._begun:
            return max(least, federation.server.nodes)
        return max(least, math.ceil(federation.quorum * federation.server.nodes))

    def _here(self) -> list[int]:
        """Invite who is new; return who is enrolled, there, and has agreed."""
        roster = self._roster.now()
        names = {public_line(key): name for name, key in logins(roster).items()}
        found = self.online()
        enrolled = {node: names[key] for node, key in found.items() if key in names}
        for node in [n for n, name in self._agreed.items() if enrolled.get(n, name) != name]:
            del self._agreed[node]
        now = self.clock()
        # A new roster goes to all: members of a secure sum must know each other.
        known = self._agreed if roster.serial == self._serial else {}
        fresh = [
            node for node in enrolled
            if node not in known and self._refused.get(node, (now,))[0] <= now
        ]  # fmt: skip
        if fresh:
            self._invite(fresh, enrolled)
        self._serial = roster.serial
        return sorted(node for node in self._agreed if node in enrolled)

    def _invite(self, nodes: list[int], names: Mapping[int, str]) -> None:
        signed = np.frombuffer((self.keys / "roster").read_bytes(), np.uint8)
        terms = Terms(self.terms.job, self.terms.terms, self.terms.fingerprint, {"roster": signed})
        _, answers = self.link.ask(Accepted, nodes, terms, _PATIENCE)
        heard = {answer.node: answer for answer in answers}
        for node in nodes:
            words = self._objection(heard.get(node), names[node])
            if not words:
                self._agreed[node] = names[node]
                self._refused.pop(node, None)
                self._pauses.pop(node, None)
                continue
            self._agreed.pop(node, None)
            again = self._refused.get(node, (0.0, ""))[1] == words
            pause = self._pauses.get(node, _AGAIN)
            self._pauses[node] = min(_MOST_AGAIN, 2 * pause)
            self._refused[node] = (self.clock() + pause, words)
            if not again:
                self.watch(ClientDone(0, names[node], "failed", words, 0))

    def _objection(self, answer: Answer[Accepted] | None, name: str) -> str:
        if answer is None:
            return f"said nothing about the terms within {_PATIENCE:g} s"
        if answer.value is None:
            return answer.problem
        if answer.value.client != name:
            return f"calls itself '{plain(answer.value.client)}'"
        if answer.value.digest != digest_of(self.terms.terms):
            return "has agreed to other terms"
        return ""

    def _named(self, answer: Answer[Reply]) -> Answer[Reply]:
        """Let a node speak under its enrolled name only."""
        name = self._agreed.get(answer.node, "")
        if isinstance(answer.value, Hello) and answer.value.client != name:
            words = f"'{name}' calls itself '{plain(answer.value.client)}'"
            return Answer(answer.node, None, words, answer.bytes_up)
        return answer


def _keys(grid: Grid) -> dict[int, str]:
    """Return the public keys of the nodes that are online, as the roster writes them."""
    found = {}
    for node in grid.get_nodes():
        if node.status != "online":
            continue
        try:
            key = serialization.load_pem_public_key(node.public_key)
        except (ValueError, UnsupportedAlgorithm):
            continue
        if isinstance(key, ec.EllipticCurvePublicKey):
            found[int(node.node_id)] = public_line(key)
    return found

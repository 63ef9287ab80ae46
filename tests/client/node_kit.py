"""Owners' nodes without a network: real keys, real text, a real small model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedtune.adapters import Tensors
from fedtune.client.node import Node
from fedtune.client.policy import OwnerPolicy
from fedtune.config import Config
from fedtune.keys.authority import make_authority
from fedtune.keys.node import Identity, new_identity, public_of
from fedtune.keys.roster import enrol
from fedtune.privacy.events import Unit
from fedtune.privacy.plan import resolve
from fedtune.server.serving import for_owners
from fedtune.server.tuned import Tuned, load_tuned
from fedtune.terms import Own, propose
from fedtune.wire import Record, Task, Terms, from_record, to_record

T = TypeVar("T", bound=Any)
# Tiny models gain nothing from threads, and lose much on a busy machine.
torch.set_num_threads(1)

NAMES = ("ann", "bob", "cy")
SECRET = "Zebedee-4711"
"""In every row of text: it must be in nothing that leaves."""
EXAMPLE: dict[str, Any] = {
    "relation": "add-or-remove-one", "population": 12, "delta": 1e-6, "noise_multiplier": 4.0,
    "sampler": "everyone",
}  # fmt: skip
"""Costs 1.06 for one round and 1.93 for three, which is found at once."""
CLIENTS: dict[str, Any] = {
    "relation": "replace-special", "population": 3, "delta": 1e-6, "noise_multiplier": 4.0,
    "noise_at": "clients", "sampler": "everyone", "clip_norm": 0.5,
}  # fmt: skip
BY_SERVER = CLIENTS | {"noise_at": "server"}
BARE = OwnerPolicy(promises=("none", "example", "client", "client-by-server"))
"""A policy of an owner who lets bare updates go."""
SECURE: dict[str, Any] = {
    "privacy__example": None, "privacy__client": CLIENTS, "federation__secure": {"threshold": 1.0},
}  # fmt: skip


def experiment(**changes: Any) -> Config:
    """Return a small experiment of DP-SGD; ``changes`` are ``table__key=value``, None removes."""
    table: dict[str, Any] = {
        "name": "wards", "seed": 7,
        "data": {"max_length": 16, "pack": False, "holdout": 0.0},
        "tuning": {"rank": 2, "lr": 5e-3, "batch_size": 12, "steps": 1},
        "federation": {"rounds": 3, "weighting": "uniform", "retries": 0},
        "privacy": {"example": EXAMPLE}, "evaluation": {"clients": 0},
    }  # fmt: skip
    for key, value in changes.items():
        *tables, last = key.split("__")
        here = table
        for name in tables:
            here = here.setdefault(name, {})
        here[last] = value
        if value is None:
            del here[last]
    return resolve(for_owners(Config.model_validate(table)))


PLAIN = experiment()


def tuned(config: Config) -> Tuned:
    """Return what a server tunes from; it does not depend on promises and rounds."""
    parts = {"seed": config.seed, "model": config.model.model_dump(),
             "tuning": config.tuning.model_dump(), "data": config.data.model_dump()}  # fmt: skip
    return _tuned(json.dumps(parts))


@cache
def _tuned(parts: str) -> Tuned:
    config = Config.model_validate(json.loads(parts))
    return load_tuned(config, config.data.labels)


@contextlib.contextmanager
def task_identity() -> Iterator[None]:
    """Let messages be made outside of Flower's own processes."""
    before = (TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id)
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    yield
    TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id = before


@dataclass
class Ward:
    """A folder with a CA, and owners with their nodes."""

    folder: Path
    identities: dict[str, Identity]
    policies: dict[str, OwnerPolicy] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    now: datetime = datetime(2026, 1, 5, 12)  # noqa: DTZ001 - local time, as the policy's

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def roster(self) -> bytes:
        return (self.keys / "roster").read_bytes()

    def own(self, name: str, **changes: Any) -> Own:
        home = self.folder / f"{name}.node"
        own = Own(name, str(self.folder / f"{name}.jsonl"), "notes", str(home / "ledger.db"))
        return replace(own, **changes)

    def node(self, name: str = "ann", **changes: Any) -> Node:
        """Return an owner's node, made at first use."""
        if name not in self.nodes:
            self.nodes[name] = Node(
                self.folder / f"{name}.node", self.identities[name],
                (self.keys / "ca.pem").read_bytes(), self.policies.get(name, OwnerPolicy()),
                self.own(name, **changes), self.told.append, lambda: self.now,
            )  # fmt: skip
        return self.nodes[name]

    def restart(self, name: str = "ann") -> Node:
        """Forget everything that is not on disk."""
        del self.nodes[name]
        return self.node(name)

    def terms(self, config: Config, job: str = "job-1", **changes: Any) -> Terms:
        """Return what an honest server sends first."""
        signed = np.frombuffer(self.roster, np.uint8)
        terms = Terms(job, propose(config), tuned(config).fingerprint, {"roster": signed})
        return replace(terms, **changes)

    def send(self, kind: str, value: Record | RecordDict, name: str = "ann") -> Message:
        """Give a node one message, as Flower would deliver it."""
        content = value if isinstance(value, RecordDict) else to_record(value)
        message = Message(content, 7, kind, ttl=100.0, group_id="1.0")
        message.metadata.__dict__["_message_id"] = "ab" * 32
        return self.node(name).answer(message)

    def agree(self, config: Config, job: str = "job-1", name: str = "ann", **changes: Any) -> str:
        """Propose an experiment; return why the node refuses it, or nothing."""
        return words_of(self.send("query.terms", self.terms(config, job, **changes), name))

    def sent(self, name: str = "ann") -> list[dict[str, Any]]:
        file = self.folder / f"{name}.node" / "sent.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]


def ward(folder: Path, names: Sequence[str] = NAMES) -> Ward:
    """Make a federation of owners; every row holds ``SECRET``."""
    make_authority(folder / "keys", "test")
    identities = {name: new_identity(name) for name in names}
    enrol(folder / "keys", *(public_of(one) for one in identities.values()))
    for name in names:
        text = {"text": f"{SECRET} slept well, {name} wrote"}
        (folder / f"{name}.jsonl").write_text((json.dumps(text) + "\n") * 12)
    return Ward(folder, identities)


def words_of(reply: Message) -> str:
    """Return what a refusal says, or nothing where there is an answer."""
    return str(reply.error.reason) if reply.has_error() else ""


def read(kind: type[T], reply: Message) -> T:
    assert not reply.has_error(), reply.error.reason
    return from_record(kind, reply.content)


def task(
    config: Config, number: int = 1, attempt: int = 0, job: str = "job-1", **more: Any
) -> Task:
    tensors: Tensors = more.pop("tensors", None) or tuned(config).start().tensors()
    return Task(number, attempt, 0, 5e-3, tensors, job)


def told(config: Config) -> dict[str, Any]:
    """Return an experiment's terms as a table to be changed."""
    return dict(json.loads(propose(config)))


def changed(terms: Mapping[str, Any], place: str, value: Any) -> str:
    """Return terms with one setting changed or added."""
    table: dict[str, Any] = json.loads(json.dumps(terms))
    *tables, last = place.split(".")
    here = table
    for name in tables:
        here = here[name]
    here[last] = value
    return json.dumps(table)


def charged(here: Ward, unit: Unit = Unit.EXAMPLE, name: str = "ann") -> int:
    """Return how many releases the node's ledger holds, over all relations."""
    ledger = here.node(name).ledger
    accounts = [one for one in ledger.accounts() if one.unit is unit]
    return sum(sum(ledger.groups(one).values()) for one in accounts)


def total(here: Ward, name: str = "ann") -> float:
    """Return the sum of what the ledger's accounts hold."""
    ledger = here.node(name).ledger
    return sum(
        ledger.spent(one, here.node(name).policy.max_delta).epsilon for one in ledger.accounts()
    )

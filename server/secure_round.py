"""One attempt at a round under secure aggregation: the server learns the sum, or nothing.

Five questions, each to those who answered the one before. Whoever is late or refused drops
out; below the threshold there is no sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from fedtune.adapters import Tensors
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import write_atomic
from fedtune.privacy.plan import client_promise, least_survivors
from fedtune.privacy.secagg import Collector, Context, from_field
from fedtune.privacy.summing import Summing, model_digest, summing_of
from fedtune.server.asking import Epochs, Member, model_for
from fedtune.server.checkpoint import State
from fedtune.server.link import Answer, Link, Reply, plain
from fedtune.server.run_folder import RunFolder
from fedtune.server.tuned import Tuned
from fedtune.terms import digest_of, propose
from fedtune.wire import (
    DEALT,
    WITHHELD,
    Advert,
    Dealt,
    Revealed,
    Signed,
    Task,
    Update,
    pack_tensors,
    unpack_tensors,
)

__all__ = ["Identities", "Secure", "SecureSum", "Told", "open_secure", "secure_attempt"]

Identities = Callable[[], Mapping[str, Ed25519PublicKey]]
Ended = Literal["ok", "late", "failed", "dropped"]
_Step = TypeVar("_Step", Advert, Dealt, Update, Signed, Revealed)

_STEP_SECONDS = 120.0


@dataclass(frozen=True)
class Told:
    """What became of one member: ``ok``, ``late``, ``failed`` or ``dropped``, and why."""

    outcome: Ended
    reason: str
    bytes_up: int
    bytes_down: int


@dataclass
class SecureSum:
    """What came out: the noisy or bare sum of ``count`` updates, or nothing.

    Attributes
    ----------
    total : mapping of name to array
        In the unit of updates; zeros where nothing came out.
    denominator : float or None
        Public constant under a promise; None: the number of survivors.
    """

    total: Mapping[str, NDArray[Any]]
    denominator: float | None
    count: int = 0

    def release(self) -> Tensors:
        """Return the mean, float32."""
        by = self.denominator or max(1, self.count)
        return {name: (value / by).astype(np.float32) for name, value in self.total.items()}


@dataclass
class _Attempt:
    """The members still in, and what became of the others."""

    link: Link
    collector: Collector
    nodes: dict[str, int]
    told: dict[str, Told] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)

    def ask(
        self, reply: type[Reply], asked: Mapping[str, Any], seconds: float,
        take: Callable[[str, Reply], None],
    ) -> None:  # fmt: skip
        """Ask members for one step; who does not answer well is out."""
        place = {self.nodes[name]: name for name in asked}
        tasks = {self.nodes[name]: record for name, record in asked.items()}
        sizes, answers = self.link.ask_each(reply, tasks, seconds)
        for node, size in sizes.items():
            self.down[place[node]] = self.down.get(place[node], 0) + size
        heard = set()
        for answer in answers:
            name = place[answer.node]
            heard.add(name)
            self.up[name] = self.up.get(name, 0) + answer.bytes_up
            self._take(name, answer, take)
        for name in sorted(asked.keys() - heard):
            self.out(name, "late", f"no {reply.__name__.lower()} within {seconds:g} s")

    def _take(self, name: str, answer: Answer[Reply], take: Callable[[str, Reply], None]) -> None:
        if answer.value is None:
            self.out(name, "failed", answer.problem)
            return
        try:
            take(name, answer.value)
        except FedtuneError as error:
            self.out(name, "dropped", plain(str(error)))

    def out(self, name: str, outcome: Ended, reason: str) -> None:
        """Note that a member is out, once."""
        self.told.setdefault(
            name, Told(outcome, reason, self.up.get(name, 0), self.down.get(name, 0))
        )


@dataclass(frozen=True)
class Secure:
    """Asks for sums, and keeps the last one until its round is committed.

    Clients add an update to one sum only. A server that dies between a sum and its commit
    must find the sum again.
    """

    file: Path
    identities: Identities

    def sum(
        self, link: Link, tuned: Tuned, state: State, chosen: Sequence[Member], task: Task,
        epochs: Epochs,
    ) -> tuple[SecureSum, dict[str, Told]]:  # fmt: skip
        """Return the sum of a cohort's updates: the one that was kept, or a new one."""
        shapes = {name: value.shape for name, value in state.adapter.items()}
        kept = self._kept(task, shapes)
        if kept is not None:
            promise = client_promise(tuned.config)
            by = promise.mechanism.denominator if promise else None
            told = {one.client: Told("ok", "", 0, 0) for one in chosen}
            return SecureSum(kept[0], by, kept[1]), told
        found, told = secure_attempt(link, tuned, state, chosen, task, epochs, self.identities)
        if found.count:
            head = np.array([task.round, found.count], np.int64)
            head = np.concatenate([head, np.frombuffer(task.job.encode(), np.uint8)])
            tensors = {f"sum/{name}": value for name, value in found.total.items()}
            write_atomic(self.file, pack_tensors(tensors | {"head": head}))
        return found, told

    def _kept(
        self, task: Task, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, NDArray[Any]], int] | None:
        if not self.file.is_file():
            return None
        arrays = unpack_tensors(self.file.read_bytes())
        head = arrays.pop("head").tolist()
        total = {name.removeprefix("sum/"): value for name, value in arrays.items()}
        mine = head[0] == task.round and bytes(head[2:]) == task.job.encode()
        same = {name: value.shape for name, value in total.items()} == dict(shapes)
        return (total, int(head[1])) if mine and same else None


def open_secure(config: Config, folder: RunFolder, identities: Identities | None) -> Secure | None:
    """Return what asks for sums, or None where the server sees single updates.

    Raises
    ------
    FedtuneError
        Secure aggregation is asked for, and nobody has an identity.
    """
    if config.federation.secure is None:
        return None
    if identities is None:
        raise FedtuneError(
            "federation.secure needs an identity for each client",
            hint="fedtune serve has them from its roster; fedtune simulate makes its own",
            code=ExitCode.SIGNATURE,
        )
    return Secure(folder.path / "sum.safetensors", identities)


def secure_attempt(
    link: Link, tuned: Tuned, state: State, chosen: Iterable[Member], task: Task,
    epochs: Epochs, identities: Identities,
) -> tuple[SecureSum, dict[str, Told]]:  # fmt: skip
    """Ask a cohort for the sum of its updates.

    Returns
    -------
    sum : SecureSum
        Its count is 0 where too few survived; then nobody learns anything.
    told : dict of str to Told
        Every member of the cohort.

    Raises
    ------
    FedtuneError
        The sum does not fit its range, whoever answers.
    """
    config = tuned.config
    members = {member.client: member for member in chosen}
    shapes = {name: value.shape for name, value in state.adapter.items()}
    sent = model_for(tuned, state, members.values(), epochs)
    agreed = digest_of(propose(config))
    digest = model_digest(next(iter(sent.values()), {}), agreed, task.lr)
    settings = config.federation.secure
    if settings is None:
        raise FedtuneError("no [federation.secure]", code=ExitCode.CONFIG)
    context = Context(
        job=task.job, round=task.round, attempt=task.attempt, model=digest,
        length=sum(math.prod(shape) for shape in shapes.values()), share=settings.threshold,
        min_cohort=settings.min_cohort, min_survivors=least_survivors(config),
    )  # fmt: skip
    collector = Collector(context, identities())
    attempt = _Attempt(link, collector, {name: one.node for name, one in members.items()})
    # Raises now what no answer can mend.
    summing_of(config, shapes, max(len(members), least_survivors(config)))
    try:
        how = _through(attempt, task, sent, config, shapes, digest)
        total = how.unflatten(from_field(collector.total()))
        count = len(collector.summed())
    except FedtuneError as error:
        # Too few, or a member that cheats: one client must not end the run.
        total, count = {n: np.zeros(shape) for n, shape in shapes.items()}, 0
        for name in members:
            attempt.out(name, "failed", f"no sum came out: {plain(str(error))}")
    summed = set(collector.summed()) if count else set()
    for name in members:
        if name in summed:
            # Who vanished after its update was in the sum has answered well.
            attempt.told[name] = Told("ok", "", attempt.up.get(name, 0), attempt.down.get(name, 0))
        attempt.out(name, "late", "left before the sum")
    promise = client_promise(config)
    by = promise.mechanism.denominator if promise else None
    return SecureSum(total, by, count), attempt.told


def _through(
    attempt: _Attempt, task: Task, sent: Mapping[str, Tensors], config: Config,
    shapes: Mapping[str, tuple[int, ...]], digest: bytes,
) -> Summing:  # fmt: skip
    """Go through the five steps; raise QUORUM where too few are left."""
    collector, number, again = attempt.collector, task.round, task.attempt
    patience = min(_STEP_SECONDS, config.federation.deadline)
    head = Advert(number, again, {"model": np.frombuffer(digest, np.uint8)}, task.job)
    attempt.ask(
        Advert, dict.fromkeys(attempt.nodes, head), patience,
        lambda name, got: collector.take_advert(name, _of(got, task).tensors),
    )  # fmt: skip
    cohort = Dealt(number, again, collector.cohort())
    how = summing_of(config, shapes, len(collector.members()))
    attempt.ask(
        Dealt, dict.fromkeys(collector.members(), cohort), patience,
        lambda name, got: collector.take_deal(name, _of(got, task).tensors),
    )  # fmt: skip
    dealers = collector.dealers()
    tasks = {
        name: replace(task, tensors=sent[name] | {
            f"{DEALT}{key}": value for key, value in collector.dealt_for(name).items()
        })
        for name in dealers
    }  # fmt: skip
    attempt.ask(
        Update, tasks, config.federation.deadline,
        lambda name, got: collector.add(name, _masked(_of(got, task)).tensors),
    )  # fmt: skip
    survivors = Signed(number, again, collector.survivors())
    attempt.ask(
        Signed, dict.fromkeys(collector.summed(), survivors), patience,
        lambda name, got: collector.take_signature(name, _of(got, task).tensors),
    )  # fmt: skip
    signed = Revealed(number, again, collector.signed())
    attempt.ask(
        Revealed, dict.fromkeys(collector.summed(), signed), patience,
        lambda name, got: collector.take_reveal(name, _of(got, task).tensors),
    )  # fmt: skip
    return how


def _of(answer: _Step, task: Task) -> _Step:
    """Refuse an answer to another round or attempt."""
    if (answer.round, answer.attempt) != (task.round, task.attempt):
        raise FedtuneError(
            f"answers round {answer.round}.{answer.attempt}, asked was "
            f"{task.round}.{task.attempt}", code=ExitCode.ENGINE,
        )  # fmt: skip
    return answer


def _masked(update: Update) -> Update:
    """Refuse figures beside a masked update: they would be in the clear."""
    figures = (update.examples, update.steps, update.truncated, update.loss)
    if figures != (1, 0, 0, WITHHELD) or update.cut_up or update.cut_down or update.kept:
        raise FedtuneError("carries figures beside its masked update", code=ExitCode.ENGINE)
    return update

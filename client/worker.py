"""One process of clients: a base model loaded once, an adapter, and their data.

Everything here takes and returns our own values; ``client.app`` puts it behind
Flower.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fedtune.adapters import Tensors, attach, change, pairs, read, trainable, write
from fedtune.client import mezo
from fedtune.client.across import Across, open_across
from fedtune.client.backprop import LocalRun, optimizer, tune
from fedtune.client.body_link import Link
from fedtune.client.epochs import Epochs, part_of, require_epoch
from fedtune.client.memory import recall, remember
from fedtune.client.policies import keep as keep_policy
from fedtune.client.policies import log as log_decisions
from fedtune.client.policies import recall as recall_policy
from fedtune.client.private import Guard, open_guard, require_job
from fedtune.client.private_round import (
    PrivateRound,
    by_gradients,
    by_probes,
    learnt_from,
    norm_of,
    open_policy,
)
from fedtune.client.private_zo import seeded_privately
from fedtune.client.seeded import Local, nothing_of, schedule_of, tune_seeded, upload
from fedtune.client.split import kept_of, only, tune_split
from fedtune.client.task_check import require_task, without_actor
from fedtune.config import Config
from fedtune.data import Encoded, Federation, Shard, encode, load
from fedtune.errors import ExitCode, FedtuneError
from fedtune.measure import measure
from fedtune.models import Base, fingerprint, load_base, require_context, settings_of, share
from fedtune.pool.agree import key_of_seed
from fedtune.pool.chain import Broadcast, Chain, read_broadcast
from fedtune.pool.codec import COEFFICIENTS, unpack
from fedtune.pool.groups import Groups, groups_of
from fedtune.pool.weights import PoolWeights
from fedtune.privacy.per_example import PerExample
from fedtune.privacy.plan import noise_source
from fedtune.privacy.rldp.policy import State
from fedtune.privacy.rldp.public import encode_public, utility_of
from fedtune.residual import set_residual, split
from fedtune.seeds import derive
from fedtune.split.blocks import Cut
from fedtune.split.calls import Service
from fedtune.wire import WITHHELD, Evaluation, Hello, Share, Task, Update

__all__ = ["Worker"]

_CACHED_CLIENTS = 64


@dataclass
class Worker:
    """Runs any client's task; clients of one process share all frozen weights.

    Parameters
    ----------
    config : Config
    folder : Path or None
        Where clients keep their own state; None: nowhere.
    service : callable or None
        Split tuning in simulations: makes the body of this process; see ``open_across``.
    """

    config: Config
    folder: Path | None = None
    service: Callable[[Base, Cut], Service] | None = None
    federation: Federation = field(init=False)
    base: Base = field(init=False)
    fingerprint: str = field(init=False)
    guard: Guard | None = field(init=False)
    groups: Groups | None = field(init=False)
    across: Across | None = field(init=False, default=None)
    public: Encoded | None = field(init=False)
    _epochs: dict[int, Epochs] = field(init=False, default_factory=dict)
    _first: nn.Module = field(init=False)
    _models: threading.local = field(init=False, default_factory=threading.local)
    _encoded: OrderedDict[tuple[str, bool], Encoded] = field(
        init=False, default_factory=OrderedDict
    )
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        config = self.config
        torch.set_num_threads(config.engine.threads)
        self.federation = load(config.data, config.seed)
        labels = self.federation.labels
        if config.tuning.cut:
            self.across = open_across(config, labels, self.service, self.folder)
            self.base = self.across.base
        else:
            self.base = load_base(config.model, labels, config.seed, config.data.template)
        require_context(self.base, config)
        self._first = attach(self.base, config.tuning, config.model.task, config.seed)
        self.fingerprint = fingerprint(self._first)
        self.guard = open_guard(config)
        example = config.privacy.example
        self.public = encode_public(config, example.rldp if example else None, self.base, labels)
        self.groups = groups_of(config)

    def shard(self, index: int) -> Shard:
        """Return the data of client ``index``."""
        if not 0 <= index < len(self.federation.shards):
            raise FedtuneError(
                f"client {index} of {len(self.federation.shards)}: there is no such client",
                code=ExitCode.DATA,
            )
        return self.federation.shards[index]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of an update, before it is packed."""
        if self.config.tuning.seeded:
            return {COEFFICIENTS: (self.config.tuning.pool.size,)}
        return {name: tuple(value.shape) for name, value in trainable(self._first).items()}

    def has_dropout(self) -> bool:
        """Say whether training draws random numbers of its own."""
        shape = settings_of(self.base.model).to_dict()
        rates = [v for k, v in shape.items() if "drop" in k and isinstance(v, int | float)]
        rates += [p.p for p in self._first.modules() if isinstance(p, nn.Dropout)]
        return any(rate > 0 for rate in rates)

    def hello(self, index: int, begun: int = 0) -> Hello:
        """Say who client ``index`` is and which model it holds.

        Raises
        ------
        FedtuneError
            The rounds after ``begun`` would pass the owner's cap.
        """
        shard, privacy = self.shard(index), self.config.privacy
        if self.guard is not None:
            self.guard.require_room(shard.name, begun)
        if self.across is not None:
            self.across.reach(index)
        # The number of rows is a figure on private data: under a promise it stays here.
        # And a secure sum, of which nobody may know a part, has no place for it.
        hidden = privacy.on or self.config.federation.secure is not None
        rows = 0 if hidden else len(shard.train)
        epochs = len(self.epochs(index).finished) if self.config.tuning.seeded else 0
        return Hello(shard.name, rows, self.fingerprint, epochs)

    def epochs(self, index: int) -> Epochs:
        """Return what client ``index`` remembers of a seeded run."""
        size, home = self.config.tuning.pool.size, self._home(index)
        if home is not None:
            # Another process may have served this client since.
            return Epochs(home, size)
        with self._lock:
            return self._epochs.setdefault(index, Epochs(None, size))

    def train(self, index: int, task: Task) -> Update:
        """Tune on one client's rows and return the difference.

        Raises
        ------
        FedtuneError
            The client has no usable row, or its update is not finite.
        """
        shard, config = self.shard(index), self.config
        task, actor = without_actor(task, config)
        if not config.tuning.seeded:
            fedex = config.federation.aggregation == "fedex"
            products = pairs(self._first) if fedex else ()
            require_task(task, self.shapes(), products, fedex=fedex)
        if self.guard is not None:
            return self._train_privately(self.guard, index, shard, task, actor)
        encoded = self._encode(shard, held=False)
        if not encoded.ids and config.privacy.client is not None:
            return self.nothing(task)
        if not encoded.ids:
            raise FedtuneError(
                f"client '{shard.name}' has no usable row among {len(shard.train)}",
                hint="check the columns and templates of [data]",
                code=ExitCode.DATA,
            )
        if config.tuning.seeded:
            return self._train_seeded(index, shard, encoded, task)
        model, link = self._load(task, index)
        optim = optimizer(model, config.tuning, task.lr)
        home = self._home(index) if config.tuning.keep_optimizer else None
        if home:
            _go_on(home, optim, task)
        # The attempt is left out: a round tried again trains its clients alike.
        seed = derive(config.seed, "train", shard.name, task.round)
        before = read(model)
        common = (model, encoded, config.tuning, config.model.task)
        kept = 0
        if link is not None:
            split_run = tune_split(*common, optim, lr=task.lr, seed=seed, pad_id=self.base.pad_id)
            ran, kept = split_run.run, split_run.kept
        elif config.tuning.method == "mezo":
            ran = mezo.tune(
                *common, lr=task.lr, seed=seed, pad_id=self.base.pad_id,
                threads=config.engine.threads,
            )  # fmt: skip
        else:
            ran = tune(*common, optim, seed=seed, pad_id=self.base.pad_id)
        delta = change(model, before)
        if not math.isfinite(ran.loss) or not all(np.isfinite(d).all() for d in delta.values()):
            if config.privacy.client is not None:
                return self.nothing(task)
            raise diverged(shard.name, task.round, ran.loss)
        if home:
            remember(home, optim, after=task.round)
        told = self._update(task, encoded, ran, delta)
        if link is None or config.privacy.on:
            return told
        sent = link.take()
        return replace(told, cut_up=sent.bytes_up, cut_down=sent.bytes_down, kept=kept)

    def nothing(self, task: Task) -> Update:
        """Return what a client adds that has nothing to say; a failure would tell it to all."""
        nothing = nothing_of(self.config.tuning, split(task.tensors)[0])
        return Update(task.round, task.attempt, 1, 0, 0, WITHHELD, nothing)

    def _update(self, task: Task, encoded: Encoded, ran: LocalRun, tensors: Tensors) -> Update:
        """Return what leaves; under a promise no figure goes with it."""
        if self.config.privacy.on:
            return Update(task.round, task.attempt, 1, 0, 0, WITHHELD, tensors)
        return Update(
            round=task.round, attempt=task.attempt, examples=len(encoded.ids), steps=ran.steps,
            truncated=encoded.truncated, loss=ran.loss, tensors=tensors,
        )  # fmt: skip

    def _train_seeded(self, index: int, shard: Shard, encoded: Encoded, task: Task) -> Update:
        """Tune on one client's rows; coefficients of the seed pool leave."""
        config = self.config
        weights, sent, chain = self._put(index, task.tensors, task.round - 1)
        schedule = schedule_of(
            config.tuning, shard.name, sent.key, task.round, self.groups, sent.odds
        )
        local = tune_seeded(
            weights, encoded, config.tuning, config.model.task, schedule, unpack(chain.running),
            lr=task.lr, seed=derive(config.seed, "train", shard.name, task.round),
            pad_id=self.base.pad_id,
        )  # fmt: skip
        if not math.isfinite(local.run.loss) or not np.isfinite(local.coefficients).all():
            if config.privacy.client is not None:
                return self.nothing(task)
            raise diverged(shard.name, task.round, local.run.loss)
        return self._update(task, encoded, local.run, self._rounded(local, shard, task))

    def share(self, index: int, task: Task) -> Share:
        """Take part in agreeing on the pool's key."""
        if self.config.tuning.pool.entropy != "os":
            raise FedtuneError("the pool's key is that of the seed", code=ExitCode.ENGINE)
        return Share({"share": part_of(self.epochs(index), task)})

    def _coefficients(
        self, placed: tuple[PoolWeights, Broadcast, Chain], given: PrivateRound, shard: Shard,
        clip_norm: float,
    ) -> tuple[Tensors, float]:  # fmt: skip
        """Tune coefficients under the example-level promise; return them as they travel."""
        weights, sent, chain = placed
        task = given.task
        schedule = schedule_of(
            self.config.tuning, shard.name, sent.key, task.round, self.groups, sent.odds
        )
        found, after = seeded_privately(
            weights, given.encoded, self.config, given.promise, given.source, schedule,
            unpack(chain.running), lr=task.lr, seed=given.seed, clip_norm=clip_norm,
            pad_id=given.pad_id,
        )  # fmt: skip
        return self._rounded(Local(found, LocalRun(0, 0.0)), shard, task), after

    def _rounded(self, local: Local, shard: Shard, task: Task) -> Tensors:
        """Return a client's coefficients as they travel; a round tried again rounds alike."""
        rng = np.random.default_rng(derive(self.config.seed, "round", shard.name, task.round))
        history = self.config.tuning.method == "fedkseed-pro" and not self.config.privacy.on
        return upload(local, self.config.tuning.pool.bits, rng, history=history)

    def _put(self, index: int, tensors: Tensors, done: int) -> tuple[PoolWeights, Broadcast, Chain]:
        """Rebuild the weights after ``done`` rounds, and agree with the server on them."""
        weights, memory = self._weights(), self.epochs(index)
        sent = read_broadcast(tensors, self.config.tuning.pool.size)
        require_epoch(self.config, sent, done)
        if self.config.tuning.pool.entropy == "seed":
            memory.pin(key_of_seed(self.config.seed))
        chain = memory.merge(sent)
        weights.put(chain)
        try:
            weights.require(sent)
        except FedtuneError:
            memory.forget()
            raise
        return weights, sent, chain

    def _weights(self) -> PoolWeights:
        """Return this thread's model as a function of coefficients."""
        weights: PoolWeights | None = getattr(self._models, "weights", None)
        if weights is None:
            threads = self.config.engine.threads
            weights = PoolWeights(self._model(), self.config.tuning, threads)
            self._models.weights = weights
        return weights

    def _train_privately(
        self, guard: Guard, index: int, shard: Shard, task: Task, actor: State
    ) -> Update:
        """Tune under the example-level promise: charged first, and no figure leaves."""
        config, home, promise = self.config, self._home(index), guard.promise
        settings = promise.settings
        source = noise_source(config, "client", shard.name, task.round, task.attempt)
        if home is not None:
            require_job(home, task.job)
        facts = {"noise": source.name, "clip": settings.clip, "clip_norm": settings.clip_norm}
        # Public, and may fail: no budget is charged for weights that cannot be rebuilt, or
        # for a policy that cannot go on.
        placed = self._put(index, task.tensors, task.round - 1) if config.tuning.seeded else None
        state = recall_policy(home, task.round) if home else {}
        policy, norm = None, norm_of(state, promise)
        if config.tuning.by_gradient:
            model = self._model()
            utility = utility_of(config, self.base, self.public, model)
            policy = open_policy(config, promise, shard.name, model, state, utility, actor)
        reservation = guard.reserve(shard.name, task, facts)
        encoded = self._encode(shard, held=False)
        kept = home if config.tuning.keep_optimizer else None
        optim = None
        rows: list[dict[str, Any]] = []
        given = PrivateRound(
            config, promise, shard.name, task, encoded, source, self.base.pad_id
        )  # fmt: skip
        if placed is not None:
            parts, norm = self._coefficients(placed, given, shard, norm)
        else:
            model, given, optim = self._begin(index, given, kept)
            if policy is not None:
                parts, rows = by_gradients(given, model, self._engine(model), optim, policy)
            else:
                parts, norm = by_probes(given, model, norm)
        # First: whoever finds it released must not leave a state that nobody paid for.
        guard.ledger.release(reservation)
        parts |= learnt_from(policy, actor)
        if kept and optim:
            remember(kept, optim, after=task.round)
        if home:
            log_decisions(home, task.round, rows)
            left = policy.state() if policy else {"clip_norm": np.array(norm)}
            keep_policy(home, task.round, left, task.committed)
        return Update(task.round, task.attempt, 1, 0, 0, WITHHELD, parts)

    def _begin(
        self, index: int, given: PrivateRound, kept: Path | None
    ) -> tuple[nn.Module, PrivateRound, torch.optim.Optimizer]:
        """Return model, examples and optimiser of one client's round."""
        model, link = self._load(given.task, index)
        if link is not None and self.config.tuning.split.prune == "el2n":
            given = replace(given, encoded=self._above(model, given.encoded))
        optim = optimizer(model, self.config.tuning, given.task.lr)
        if kept:
            _go_on(kept, optim, given.task)
        torch.manual_seed(given.seed)
        return model, given, optim

    def evaluate(self, index: int, task: Task) -> Evaluation:
        """Measure the adapter of ``task`` on one client's held-out rows.

        Raises
        ------
        FedtuneError
            A privacy promise covers the rows: scores would be releases.
        """
        if self.config.privacy.on:
            raise FedtuneError(
                "scores on private rows are releases that no budget covers",
                hint="measure on a public file: data.eval",
                code=ExitCode.PRIVACY,
            )
        if self.config.federation.secure is not None or self.config.evaluation.clients == 0:
            raise FedtuneError(
                "scores of one client would tell what a secure sum hides, or were not agreed to",
                hint="measure on a public file: data.eval", code=ExitCode.PRIVACY,
            )  # fmt: skip
        encoded = self._encode(self.shard(index), held=True)
        seeded = self.config.tuning.seeded
        model = (
            self._put(index, task.tensors, task.round)[0].model
            if seeded
            else self._load(task, index, "e")[0]
        )
        limit = self.config.evaluation.max_examples
        if limit:
            encoded = Encoded(
                encoded.ids[:limit], encoded.targets[:limit], encoded.rows, encoded.truncated,
                encoded.dropped,
            )  # fmt: skip
        counts = measure(
            model, encoded, self.config.model.task,
            batch_size=self.config.evaluation.batch_size, pad_id=self.base.pad_id,
            labels=len(self.federation.labels),
        )  # fmt: skip
        return Evaluation(
            round=task.round, loss=counts.loss, units=counts.units, correct=counts.correct,
            examples=counts.examples, tensors={"confusion": counts.confusion},
        )  # fmt: skip

    def _load(
        self, task: Task, index: int, what: Literal["t", "e"] = "t"
    ) -> tuple[nn.Module, Link | None]:
        """Return this thread's model with a task's parameters, and its link to the body."""
        model = self._model()
        adapter, residual = split(task.tensors)
        set_residual(model, residual)
        write(model, adapter)
        if self.across is None:
            return model, None
        link = self.across.connect(model, index, task, what)
        link.take()
        return model, link

    def _above(self, model: nn.Module, encoded: Encoded) -> Encoded:
        """Return the examples whose own score reaches the public threshold.

        Each is kept or not whatever the others are, so a promise about examples holds.
        """
        settings, task = self.config.tuning.split, self.config.model.task
        if not settings.threshold or not encoded.ids:
            return encoded
        given = {"seed": self.config.seed, "pad_id": self.base.pad_id}
        return only(encoded, kept_of(model, encoded, settings, task, **given))

    def _home(self, index: int) -> Path | None:
        """Return a client's own folder, by number: its name may hold any character."""
        return self.folder / f"{index:06d}" if self.folder else None

    def _engine(self, model: nn.Module) -> PerExample:
        """Return this thread's per-example engine, proved right on public tokens."""
        engine: PerExample | None = getattr(self._models, "engine", None)
        if engine is None:
            engine = PerExample(model)
            engine.prove(self.config.model.task)
            self._models.engine = engine
        return engine

    def _model(self) -> nn.Module:
        """Return this thread's model; threads share every frozen tensor."""
        model: nn.Module | None = getattr(self._models, "model", None)
        if model is None:
            with self._lock:
                model = share(self._first)
            torch.set_num_threads(self.config.engine.threads)
            self._models.model = model
        return model

    def _encode(self, shard: Shard, *, held: bool) -> Encoded:
        """Return a client's examples; the lock also keeps the tokenizer to one thread."""
        key = (shard.name, held)
        with self._lock:
            if key not in self._encoded:
                rows = shard.held if held else shard.train
                labels = self.federation.labels
                made = encode(rows, self.base.tokenizer, self.config.data, labels)
                self._encoded[key] = made
            self._encoded.move_to_end(key)
            while len(self._encoded) > _CACHED_CLIENTS:
                self._encoded.popitem(last=False)
            return self._encoded[key]


def diverged(client: str, number: int, loss: float) -> FedtuneError:
    """Return the error of a client whose tuning left the finite numbers."""
    return FedtuneError(
        f"client '{client}' diverged in round {number}: loss {loss}",
        hint="lower tuning.lr or set tuning.max_grad_norm",
        code=ExitCode.ENGINE,
    )


def _go_on(home: Path, optim: torch.optim.Optimizer, task: Task) -> None:
    """Load the optimiser's state of the round before, with this round's learning rate."""
    recall(home, optim, before=task.round, committed=task.committed)
    for group in optim.param_groups:
        group["lr"] = task.lr

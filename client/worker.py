"""One process of clients: a base model loaded once, an adapter, and their data.

Everything here takes and returns our own values; ``client.app`` puts it behind
Flower.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedtune.adapters import Tensors, attach, read, write
from fedtune.client.backprop import optimizer, tune
from fedtune.client.memory import recall, remember
from fedtune.client.private import (
    Guard,
    clip_after,
    clip_before,
    open_guard,
    require_job,
    tune_privately,
)
from fedtune.config import Config
from fedtune.data import Encoded, Federation, Shard, encode, load
from fedtune.errors import ExitCode, FedtuneError
from fedtune.measure import measure
from fedtune.models import Base, fingerprint, load_base, require_context, settings_of, share
from fedtune.privacy.per_example import PerExample
from fedtune.privacy.plan import noise_source
from fedtune.residual import set_residual, split
from fedtune.seeds import derive
from fedtune.wire import WITHHELD, Evaluation, Hello, Task, Update

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
    """

    config: Config
    folder: Path | None = None
    federation: Federation = field(init=False)
    base: Base = field(init=False)
    fingerprint: str = field(init=False)
    guard: Guard | None = field(init=False)
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
        self.base = load_base(config.model, self.federation.labels, config.seed)
        require_context(self.base, config)
        self._first = attach(self.base, config.tuning, config.model.task, config.seed)
        self.fingerprint = fingerprint(self._first)
        self.guard = open_guard(config)

    def shard(self, index: int) -> Shard:
        """Return the data of client ``index``."""
        if not 0 <= index < len(self.federation.shards):
            raise FedtuneError(
                f"client {index} of {len(self.federation.shards)}: there is no such client",
                code=ExitCode.DATA,
            )
        return self.federation.shards[index]

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
        # The number of rows is a figure on private data: under a promise it stays here.
        rows = 0 if privacy.on else len(shard.train)
        return Hello(shard.name, rows, self.fingerprint)

    def train(self, index: int, task: Task) -> Update:
        """Tune on one client's rows and return the difference.

        Raises
        ------
        FedtuneError
            The client has no usable row, or its update is not finite.
        """
        shard, config = self.shard(index), self.config
        if self.guard is not None:
            return self._train_privately(self.guard, index, shard, task)
        encoded = self._encode(shard, held=False)
        if not encoded.ids and config.privacy.client is not None:
            # Who has nothing to say adds nothing; a failure would tell it to all.
            nothing = {name: np.zeros_like(value) for name, value in split(task.tensors)[0].items()}
            return Update(task.round, task.attempt, 1, 0, 0, WITHHELD, nothing)
        if not encoded.ids:
            raise FedtuneError(
                f"client '{shard.name}' has no usable row among {len(shard.train)}",
                hint="check the columns and templates of [data]",
                code=ExitCode.DATA,
            )
        model = self._load(task.tensors)
        optim = optimizer(model, config.tuning, task.lr)
        home = self._home(index) if config.tuning.keep_optimizer else None
        if home:
            _go_on(home, optim, task)
        # The attempt is left out: a round tried again trains its clients alike.
        seed = derive(config.seed, "train", shard.name, task.round)
        before = read(model)
        ran = tune(
            model, encoded, config.tuning, config.model.task, optim,
            seed=seed, pad_id=self.base.pad_id,
        )  # fmt: skip
        after = read(model)
        delta = {name: after[name] - before[name] for name in before}
        if not math.isfinite(ran.loss) or not all(np.isfinite(d).all() for d in delta.values()):
            raise FedtuneError(
                f"client '{shard.name}' diverged in round {task.round}: loss {ran.loss}",
                hint="lower tuning.lr or set tuning.max_grad_norm",
                code=ExitCode.ENGINE,
            )
        if home:
            remember(home, optim, after=task.round)
        if config.privacy.on:
            return Update(task.round, task.attempt, 1, 0, 0, WITHHELD, delta)
        return Update(
            round=task.round, attempt=task.attempt, examples=len(encoded.ids), steps=ran.steps,
            truncated=encoded.truncated, loss=ran.loss, tensors=delta,
        )  # fmt: skip

    def _train_privately(self, guard: Guard, index: int, shard: Shard, task: Task) -> Update:
        """Tune under the example-level promise: charged first, and no figure leaves."""
        config, home = self.config, self._home(index)
        promise, default = guard.promise, guard.promise.settings.clip_norm
        adaptive = promise.settings.clip == "quantile" and home is not None
        clip_norm = clip_before(home, task.round, default) if adaptive and home else default
        source = noise_source(
            config, "client", shard.name, task.round, task.attempt
        )  # fmt: skip
        if home is not None:
            require_job(home, task.job)
        facts = {"noise": source.name, "clip": promise.settings.clip, "clip_norm": default}
        reservation = guard.reserve(shard.name, task, facts)
        encoded = self._encode(shard, held=False)
        model = self._load(task.tensors)
        optim = optimizer(model, config.tuning, task.lr)
        kept = home if config.tuning.keep_optimizer else None
        if kept:
            _go_on(kept, optim, task)
        torch.manual_seed(derive(config.seed, "train", shard.name, task.round))
        before = read(model)
        after_norm = tune_privately(
            model, self._engine(model), encoded, config, promise, optim, source,
            clip_norm=clip_norm, pad_id=self.base.pad_id,
        )  # fmt: skip
        after = read(model)
        # First: whoever finds it released must not leave a state that nobody paid for.
        guard.ledger.release(reservation)
        if kept:
            remember(kept, optim, after=task.round)
        if adaptive and home:
            clip_after(home, task.round, after_norm, task.committed)
        delta = {name: after[name] - before[name] for name in before}
        return Update(task.round, task.attempt, 1, 0, 0, WITHHELD, delta)

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
        encoded = self._encode(self.shard(index), held=True)
        limit = self.config.evaluation.max_examples
        if limit:
            encoded = Encoded(
                encoded.ids[:limit], encoded.targets[:limit], encoded.rows, encoded.truncated,
                encoded.dropped,
            )  # fmt: skip
        counts = measure(
            self._load(task.tensors), encoded, self.config.model.task,
            batch_size=self.config.evaluation.batch_size, pad_id=self.base.pad_id,
            labels=len(self.federation.labels),
        )  # fmt: skip
        return Evaluation(
            round=task.round, loss=counts.loss, units=counts.units, correct=counts.correct,
            examples=counts.examples, tensors={"confusion": counts.confusion},
        )  # fmt: skip

    def _load(self, tensors: Tensors) -> nn.Module:
        model = self._model()
        adapter, residual = split(tensors)
        set_residual(model, residual)
        write(model, adapter)
        return model

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


def _go_on(home: Path, optim: torch.optim.Optimizer, task: Task) -> None:
    """Load the optimiser's state of the round before, with this round's learning rate."""
    recall(home, optim, before=task.round, committed=task.committed)
    for group in optim.param_groups:
        group["lr"] = task.lr

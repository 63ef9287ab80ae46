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
from fedtune.config import Config
from fedtune.data import Encoded, Federation, Shard, encode, load
from fedtune.errors import ExitCode, FedtuneError
from fedtune.measure import measure
from fedtune.models import Base, fingerprint, load_base, require_context, settings_of, share
from fedtune.residual import set_residual, split
from fedtune.seeds import derive
from fedtune.wire import Evaluation, Hello, Task, Update

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

    def hello(self, index: int) -> Hello:
        """Say who client ``index`` is and which model it holds."""
        shard = self.shard(index)
        return Hello(shard.name, len(shard.train), self.fingerprint)

    def train(self, index: int, task: Task) -> Update:
        """Tune on one client's rows and return the difference.

        Raises
        ------
        FedtuneError
            The client has no usable row, or its update is not finite.
        """
        shard, config = self.shard(index), self.config
        encoded = self._encode(shard, held=False)
        if not encoded.ids:
            raise FedtuneError(
                f"client '{shard.name}' has no usable row among {len(shard.train)}",
                hint="check the columns and templates of [data]",
                code=ExitCode.DATA,
            )
        model = self._load(task.tensors)
        optim = optimizer(model, config.tuning, task.lr)
        # By number: a client's name may hold any character.
        home = (
            self.folder / f"{index:06d}" if self.folder and config.tuning.keep_optimizer else None
        )
        if home:
            recall(home, optim, before=task.round, committed=task.committed)
            for group in optim.param_groups:
                group["lr"] = task.lr
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
        return Update(
            round=task.round, attempt=task.attempt, examples=len(encoded.ids), steps=ran.steps,
            truncated=encoded.truncated, loss=ran.loss, tensors=delta,
        )  # fmt: skip

    def evaluate(self, index: int, task: Task) -> Evaluation:
        """Measure the adapter of ``task`` on one client's held-out rows."""
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

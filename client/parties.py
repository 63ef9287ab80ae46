"""The clients of one process as parties to secure sums: a ``Worker`` behind masks."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fedtune.client.private import open_shared_guard, require_job
from fedtune.client.quiet import train_quietly
from fedtune.client.secure import Masking, Party, split_dealt
from fedtune.client.worker import Worker
from fedtune.config import Config
from fedtune.privacy.plan import noise_source
from fedtune.wire import Advert, Dealt, Revealed, Signed, Task, Update

__all__ = ["Parties"]


@dataclass
class Parties:
    """One ``Masking`` for each client.

    Parameters
    ----------
    config : Config
    party_of : callable
        Takes a client's name, returns who it is to the others.
    agreed : str
        SHA-256 of the terms: with other terms there is no sum.
    """

    config: Config
    party_of: Callable[[str], Party]
    agreed: str
    _known: dict[int, Masking] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, worker: Worker, index: int) -> Masking:
        """Return a client's masking, made at first use."""
        with self._lock:
            if index not in self._known:
                party = self.party_of(worker.shard(index).name)
                home = worker.folder / f"{index:06d}" if worker.folder else None
                guard = open_shared_guard(self.config)
                self._known[index] = Masking(self.config, party, guard, self.agreed, home)
            return self._known[index]

    def advert(self, worker: Worker, index: int, asked: Advert) -> Advert:
        """Begin an attempt."""
        length = sum(math.prod(shape) for shape in worker.shapes().values())
        return self.of(worker, index).advert(asked, length)

    def deal(self, worker: Worker, index: int, asked: Dealt) -> Dealt:
        """Give each neighbour its share."""
        return self.of(worker, index).deal(asked)

    def train(self, worker: Worker, index: int, task: Task) -> Update:
        """Tune, clip, add noise and mask; the task's own tensors are the model."""
        own, dealt = split_dealt(task.tensors)
        plain, masking = replace(task, tensors=own), self.of(worker, index)
        if masking.guard is not None and masking.home is not None:
            masking.home.mkdir(parents=True, exist_ok=True)
            require_job(masking.home, task.job)
        masking.begin(plain)
        update = train_quietly(worker, index, plain)
        source = None
        if masking.guard is not None:
            name = masking.party.name
            source = noise_source(self.config, "share", name, task.round, task.attempt)
        return masking.mask(update, worker.shapes(), dealt, source)

    def sign(self, worker: Worker, index: int, asked: Signed) -> Signed:
        """Sign who survived."""
        return self.of(worker, index).sign(asked)

    def reveal(self, worker: Worker, index: int, asked: Revealed) -> Revealed:
        """Give what takes the masks off the sum."""
        return self.of(worker, index).reveal(asked)

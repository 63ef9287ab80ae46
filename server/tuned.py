"""The server's own copy of the tuned model: where shapes, checks and the result come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fedtune.adapters import Pair, attach, pairs, read, write
from fedtune.config import Config
from fedtune.data import Encoded, encode, load_eval
from fedtune.errors import ExitCode, FedtuneError
from fedtune.measure import Counts, measure
from fedtune.models import Base, fingerprint, load_base, require_context
from fedtune.pool.groups import Groups, groups_of
from fedtune.pool.weights import PoolWeights
from fedtune.privacy.rldp.policy import Utility
from fedtune.privacy.rldp.public import encode_public, utility_of
from fedtune.privacy.rldp.sight import Public
from fedtune.residual import set_residual
from fedtune.server.checkpoint import State
from fedtune.split.blocks import cut_of
from fedtune.split.parts import body_names

__all__ = ["Tuned", "load_tuned"]


@dataclass(frozen=True)
class Tuned:
    """Base and adapter as the server holds them.

    Attributes
    ----------
    pairs : tuple of Pair
        Low-rank products whose averaging error can be known.
    held_out : Encoded or None
        The federation's own held-out examples, if the file names any.
    weights : PoolWeights or None
        Where only coefficients of a seed pool travel.
    groups : Groups or None
        Which of them, where clients share directions.
    public : Encoded or None
        Public text that a clipping policy at the server is rewarded by.
    """

    config: Config
    base: Base
    model: nn.Module
    fingerprint: str
    pairs: tuple[Pair, ...]
    labels: tuple[str, ...]
    held_out: Encoded | None
    weights: PoolWeights | None = None
    groups: Groups | None = None
    public: Encoded | None = None

    def start(self) -> State:
        """Return the state before the first round: a fresh adapter."""
        return State(0, read(self.model), self.fingerprint)

    def put(self, state: State) -> nn.Module:
        """Write a state into the model and return it."""
        if self.weights is not None and state.chain is not None:
            self.weights.put(state.chain)
            return self.model
        set_residual(self.model, state.residual)
        write(self.model, state.adapter)
        return self.model

    def evaluate(self, state: State) -> Counts | None:
        """Measure a state on the federation's held-out examples, if there are any."""
        if self.held_out is None:
            return None
        return measure(
            self.put(state), self.held_out, self.config.model.task,
            batch_size=self.config.evaluation.batch_size, pad_id=self.base.pad_id,
            labels=len(self.labels),
        )  # fmt: skip

    def utility(self, state: State) -> Utility | None:
        """Return what measures a state on public text, for a clipping policy that asks."""
        measured = utility_of(self.config, self.base, self.public, self.model)
        if measured is None:
            return None

        def utility() -> Public[float]:
            self.put(state)
            return measured()

        return utility


def load_tuned(config: Config, labels: tuple[str, ...]) -> Tuned:
    """Load the base model and a fresh adapter for an experiment."""
    torch.set_num_threads(config.engine.threads)
    base = load_base(config.model, labels, config.seed, config.data.template)
    model = attach(base, config.tuning, config.model.task, config.seed)
    require_context(base, config)
    products = pairs(model)
    if config.federation.aggregation == "fedex" and not products:
        raise FedtuneError(
            "federation.aggregation='fedex' finds no plain LoRA product in this adapter",
            hint="use aggregation='mean', or remove tuning.options such as use_dora",
            code=ExitCode.CONFIG,
        )
    rows = load_eval(config.data, labels) if config.data.eval else ()
    held_out = encode(rows, base.tokenizer, config.data, labels) if rows else None
    body: tuple[str, ...] = ()
    if config.tuning.cut:
        split = config.tuning.split
        body = body_names(model, cut_of(model, split.head, split.tail))
    # A client of a cut model has no body to compare.
    found = fingerprint(model, without=body)
    weights = None
    if config.tuning.seeded:
        weights = PoolWeights(model, config.tuning, config.engine.threads)
    rldp = config.privacy.client.rldp if config.privacy.client else None
    return Tuned(
        config, base, model, found, products, labels, held_out, weights, groups_of(config),
        encode_public(config, rldp, base, labels),
    )  # fmt: skip

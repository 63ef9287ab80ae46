"""Runs of which only coefficients of a seed pool travel: state, tasks and uploads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.adapters import Tensors
from fedtune.config import Config
from fedtune.errors import FedtuneError
from fedtune.pool.chain import Chain, broadcast
from fedtune.pool.codec import COEFFICIENTS, MOST_SLOPE, from_wire, pack, unpack
from fedtune.pool.philox import pool_key
from fedtune.pool.weights import PoolWeights
from fedtune.server.checkpoint import State
from fedtune.server.optimizer import Moments
from fedtune.server.tuned import Tuned
from fedtune.wire import Update

__all__ = [
    "add_histories",
    "advance",
    "begin",
    "chain_of",
    "decode",
    "draws",
    "narrow",
    "outside",
    "shares",
    "tensors_for",
    "widen",
]

SIZES, DRAWS = "sizes", "draws"
"""FedKSeed-Pro: summed magnitude and number of a seed's slopes so far, shape (K,)."""

_DOWN_BITS = 16
_LARGEST = 1e3  # far above any step, far below where accumulators could not be packed


def begin(config: Config, fingerprint: str, key: bytes) -> State:
    """Return the state before the first round: all coefficients zero."""
    size = config.tuning.pool.size
    nothing = np.zeros(size, np.float32)
    adapter = {COEFFICIENTS: nothing}
    history = {}
    if config.tuning.method == "fedkseed-pro":
        history = {SIZES: nothing.copy(), DRAWS: nothing.copy()}
    chain = Chain(key, (), pack(nothing, _down_bits(config)))
    return State(0, adapter, fingerprint, chain=chain, history=history)


def tensors_for(
    config: Config, weights: PoolWeights, state: State, known: Iterable[int]
) -> dict[int, Tensors]:
    """Return what a task carries to clients that have the first so many pool epochs.

    The weights are rebuilt and hashed once, whoever lacks what.
    """
    chain = chain_of(state)
    weights.put(chain)
    root, marks = weights.hashes()
    odds = None
    if config.tuning.method == "fedkseed-pro":
        odds = shares(state.history).astype(np.float16)
    return {count: broadcast(chain, root, marks, count, odds) for count in set(known)}


def chain_of(state: State) -> Chain:
    """Return the chain of a seeded state."""
    if state.chain is None:
        raise ValueError("this state has no pool")
    return state.chain


def advance(config: Config, before: State, after: State) -> State:
    """Round the new accumulators to what is broadcast, and fold a pool that has served.

    Accumulators keep their full precision, so that rounding does not add up.
    """
    pool, chain = config.tuning.pool, chain_of(before)
    bits = _down_bits(config)
    total = after.adapter[COEFFICIENTS]
    after = replace(after, history=_history(config, before, after))
    if not pool.refresh or after.round % pool.refresh:
        return replace(after, chain=replace(chain, running=pack(total, bits)))
    nothing = np.zeros_like(total)
    # What rounding takes away at a fold is gone for good, so it must have no bias.
    folded = pack(total, bits, np.random.default_rng(pool_key(chain.key, chain.epoch)))
    fresh = Chain(chain.key, (*chain.finished, folded), pack(nothing, bits))
    # Momentum over coefficients means nothing in another pool.
    return replace(after, chain=fresh, adapter={COEFFICIENTS: nothing}, moments=Moments())


def decode(update: Update, config: Config) -> Update:
    """Return an upload with dense float32 coefficients.

    Raises
    ------
    FedtuneError
        It is not one: wrong names, shapes or numbers.
    """
    size = config.tuning.pool.size
    parts = dict(update.tensors)
    extra = {}
    sizes, counts = parts.pop(SIZES, None), parts.pop(DRAWS, None)
    dense = unpack(from_wire(parts, size))
    if config.tuning.method == "fedkseed-pro" and not config.privacy.on:
        # After the coefficients: only then their places are known to be good.
        extra = _draws(sizes, counts, parts.get("at"), size)
    elif sizes is not None or counts is not None:
        raise FedtuneError("carries a history of seeds that nobody asked for")
    if (most := float(np.abs(dense).max(initial=0.0))) > _LARGEST:
        raise FedtuneError(
            f"a coefficient of {most:.3g} (limit {_LARGEST:g}): is tuning.lr too large?"
        )
    return replace(update, tensors={COEFFICIENTS: dense, **extra})


def narrow(tuned: Tuned, tensors: Tensors, number: int) -> Tensors:
    """Keep the coefficients that some client may use in a round: only they need noise."""
    if tuned.groups is None or set(tensors) != {COEFFICIENTS}:
        return tensors
    return {COEFFICIENTS: tensors[COEFFICIENTS][tuned.groups.used(number)]}


def widen(tuned: Tuned, mean: Tensors, number: int) -> Tensors:
    """Undo ``narrow``: a mean is zero where nobody could be."""
    if tuned.groups is None or set(mean) != {COEFFICIENTS}:
        return mean
    whole = np.zeros(tuned.config.tuning.pool.size, np.float32)
    whole[tuned.groups.used(number)] = mean[COEFFICIENTS]
    return {COEFFICIENTS: whole}


def outside(tuned: Tuned, state: State, client: str, number: int, tensors: Tensors) -> bool:
    """Say whether an upload goes where its client's group has no directions this round."""
    if tuned.groups is None:
        return False
    groups = tuned.groups
    rest = tensors[COEFFICIENTS].copy()
    rest[groups.columns(groups.of(client, chain_of(state).key), number)] = 0.0
    return bool(rest.any())


def draws(update: Update) -> Tensors:
    """Return the history parts of a decoded upload, empty unless FedKSeed-Pro."""
    return {name: update.tensors[name] for name in (SIZES, DRAWS) if name in update.tensors}


def shares(history: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return how likely FedKSeed-Pro draws each seed (Qin et al. 2024, section 4.3).

    The softmax of the mean magnitudes, scaled to between 0 and 1; a seed never drawn
    counts as the mean of all.

    Examples
    --------
    >>> history = {SIZES: np.array([2.0, 0.0, 9.0], np.float32),
    ...            DRAWS: np.array([2.0, 0.0, 3.0], np.float32)}
    >>> [f"{value:.3f}" for value in shares(history)]
    ['0.186', '0.307', '0.506']
    """
    sizes, counts = history[SIZES].astype(np.float64), history[DRAWS].astype(np.float64)
    known = counts > 0
    mean = np.divide(sizes, counts, out=np.zeros_like(sizes), where=known)
    if not known.any():
        return np.full(len(mean), 1.0 / len(mean), np.float32)
    mean[~known] = mean[known].mean()
    width = float(np.ptp(mean))
    scaled = (mean - mean.min()) / width if width > 0 else np.zeros_like(mean)
    odds = np.exp(scaled - scaled.max())
    found: NDArray[np.float32] = (odds / odds.sum()).astype(np.float32)
    return found


def _history(config: Config, before: State, after: State) -> Tensors:
    """Return Pro's history after a round; under privacy from the released sums alone."""
    if config.tuning.method != "fedkseed-pro" or not config.privacy.on:
        return after.history
    moved = np.abs(after.adapter[COEFFICIENTS] - before.adapter[COEFFICIENTS])
    return {SIZES: before.history[SIZES] + moved, DRAWS: before.history[DRAWS] + np.float32(1)}


def _draws(
    sizes: NDArray[Any] | None, counts: NDArray[Any] | None, at: NDArray[Any] | None, size: int
) -> Tensors:
    wanted = size if at is None else len(at)
    good = (
        sizes is not None and counts is not None
        and sizes.dtype == np.float16 and counts.dtype == np.uint16
        and sizes.shape == counts.shape == (wanted,)
        and bool(((sizes >= 0) & (sizes <= MOST_SLOPE)).all())
    )  # fmt: skip
    if not good or sizes is None or counts is None:
        raise FedtuneError("the history of seeds is missing or of a wrong kind")
    place = np.arange(size) if at is None else at
    found = {SIZES: np.zeros(size, np.float32), DRAWS: np.zeros(size, np.float32)}
    found[SIZES][place] = sizes.astype(np.float32) * counts
    found[DRAWS][place] = counts
    return found


def _down_bits(config: Config) -> int:
    """Return the width of broadcast coefficients: 16 bits carry an accumulated vector well."""
    return max(_DOWN_BITS, config.tuning.pool.bits)


def add_histories(history: Tensors, found: Iterable[Tensors]) -> Tensors:
    """Return Pro's history with that of one round's clients added."""
    total = {name: value.copy() for name, value in history.items()}
    for parts in found:
        for name, value in parts.items():
            total[name] += value
    return total

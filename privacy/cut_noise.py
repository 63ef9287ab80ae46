"""Noise on what goes through the cut of a split model, at the client, before it leaves.

One record is one example's hidden state, or the gradient that the tail returns for it:
all its real positions together. It is clipped to C and given noise of standard deviation
z C on every coordinate, on the lattice of ``lattice.py``: replacing the example by another
of the same length moves the record by at most 2 C (``research/split_peft.md`` C.3).

What stays in the open: lengths, how many examples there are, and when they are sent. And
a small epsilon is bought with noise in which nothing is left to learn from; see
``server_view`` and docs/split.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import accounting
from fedtune.privacy.events import Event, Gaussian, Relation
from fedtune.privacy.lattice import clip_update, grid_of, require_clip
from fedtune.privacy.noise import NoiseSource

__all__ = ["cut_event", "noised", "record_epsilon"]

Spans = Sequence[tuple[int, int]]


def noised(
    values: Tensor, spans: Spans | None, clip: float, z: float, source: NoiseSource
) -> Tensor:
    """Clip each example's record and add noise to it.

    Parameters
    ----------
    values : Tensor
        (B, T, d), hidden states or gradients, any floating type.
    spans : sequence of (int, int), or None
        Per example, where its real positions begin and end. None: all are real.
    clip : float
        C, the L2 norm that a whole record has at most.
    z : float
        Noise multiplier: every real coordinate gets N(0, (z C)^2).
    source : NoiseSource

    Returns
    -------
    Tensor
        (B, T, d) float32, on the CPU, without a graph. Padding is zero. A record with a NaN
        or an infinity counts as zero, and so becomes noise alone: an error would tell more.

    Raises
    ------
    FedtuneError
        A clip norm or a noise multiplier that is no positive number, or spans that do not fit.

    Examples
    --------
    >>> from fedtune.privacy.noise import InsecureSeededNoise
    >>> hidden = torch.full((1, 3, 4), 100.0)
    >>> sent = noised(hidden, [(0, 2)], clip=1.0, z=1e-9, source=InsecureSeededNoise(0))
    >>> round(float(sent.norm()), 3), float(sent[0, 2].abs().sum())
    (1.0, 0.0)
    """
    require_clip(clip)
    _positive(z)
    if values.dim() != 3 or not values.is_floating_point():
        raise _refuse(f"a {values.dtype} tensor of shape {tuple(values.shape)}", "use (B, T, d)")
    batch, length, width = values.shape
    spans = [(0, length)] * batch if spans is None else spans
    if len(spans) != batch or any(not 0 <= start <= end <= length for start, end in spans):
        raise _refuse(f"real positions {list(spans)[:3]} of {batch} x {length}", "one pair a row")
    given = values.detach().float().cpu().numpy()
    sent = np.zeros((batch, length, width), np.float32)
    for row, (start, end) in enumerate(spans):
        if start == end or width == 0:
            continue
        grid = grid_of(clip, (end - start) * width)
        record = clip_update({"": given[row, start:end]}, clip)[""]
        noise = np.rint(source.normal(record.size) * (z * clip / grid))
        sent[row, start:end] = (record + noise.reshape(record.shape)) * grid
    return torch.from_numpy(sent)


def cut_event(z: float) -> Event:
    """Return the event of one record under replacement: sensitivity 2 C, noise z C.

    Examples
    --------
    >>> cut_event(1.38)
    Gaussian(noise_multiplier=0.69)
    """
    _positive(z)
    return Gaussian(z / 2)


def record_epsilon(z: float, delta: float) -> float:
    """Return epsilon of one noised record taken alone, for replacing its example.

    It says how much noise that is. A run sends more, and records that depend on other examples:
    nothing follows for a run (see ``server_view``). As zero-concentrated privacy it is
    rho = 2 / z^2 (Bun and Steinke 2016, proposition 1.6), which gives 8.0 for the number below;
    the accountant's is smaller, since it is exact for Gaussians.

    Parameters
    ----------
    z : float
        Noise multiplier, over the clip norm.
    delta : float

    Examples
    --------
    >>> round(record_epsilon(1.38, 1e-5), 2)
    6.77
    """
    return accounting.spent({cut_event(z): 1}, delta, Relation.REPLACE_SPECIAL).epsilon


def _positive(z: float) -> None:
    if isinstance(z, bool) or not math.isfinite(z) or z <= 0:
        raise _refuse(f"tuning.split.noise={z!r}", "use a finite number above 0")


def _refuse(what: str, hint: str) -> FedtuneError:
    return FedtuneError(f"noise at the cut: {what}", hint=hint, code=ExitCode.PRIVACY)

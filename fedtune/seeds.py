"""Every random choice of a run, from one root seed.

Public choices only: data order, cohorts, initial adapters. Privacy noise never
comes from here.
"""

from __future__ import annotations

import hashlib

__all__ = ["derive"]


def derive(seed: int, *parts: int | str) -> int:
    """Return a 63-bit seed for one purpose, independent of every other purpose.

    Parameters
    ----------
    seed : int
        The root seed of the run.
    *parts : int or str
        What the seed is for, e.g. ``"cohort", round`` or ``"train", client, round``.

    Examples
    --------
    >>> derive(0, "cohort", 1) == derive(0, "cohort", 1)
    True
    >>> derive(0, "cohort", 1) == derive(0, "cohort", 2)
    False
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1

"""What this machine has, and what this run takes of it."""

from __future__ import annotations

import os

import psutil

__all__ = ["cores", "memory_mb"]


def cores() -> int:
    """Return the processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_mb() -> float:
    """Return the memory of this process and its children in MB, shared pages counted once.

    Uses the unique set of every process plus the shared part of this one.
    """
    me = psutil.Process()
    total = me.memory_info().rss
    for child in me.children(recursive=True):
        try:
            total += child.memory_full_info().uss
        except psutil.Error:
            continue
    return round(total / 2**20, 1)

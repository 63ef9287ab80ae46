"""What fuzzing tests share: bent bytes, and a decoder's time and memory.

``FEDTUNE_FUZZ=100000`` makes that many inputs for each test.
"""

from __future__ import annotations

import itertools
import os
import random
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from fedtune.errors import FedtuneError

INPUTS = int(os.environ.get("FEDTUNE_FUZZ", "300"))
SECONDS = 5.0
"""For one input; a machine may be busy."""
WEIGHED = 1 if INPUTS < 1000 else 20
"""Memory is traced for one input of so many: it takes several times as long."""
_COUNT = itertools.count()
ROOM = 2 << 20
"""Bytes that any input may take, besides eight times its own."""
ODD: list[Any] = [
    0, 1, -1, 2**31, 2**63, -(2**63), 10**40, 0.0, -0.0, 1e308, 5e-324, float("nan"), float("inf"),
    "", "x" * 3000, "\0", "\ud800", "../..", "{}", "é\u202e", True, False, None, [], {}, [[]],
    [1, "a"], {"a": 1}, b"", b"\xff" * 9,
]  # fmt: skip


def seed(name: str) -> random.Random:
    return random.Random(name if INPUTS < 1000 else None)


def bent(rng: random.Random, data: bytes, words: tuple[bytes, ...] = ()) -> bytes:
    """Change some bytes: flipped, cut, doubled, or replaced by what parsers trip over."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found) + 1)
        match rng.randint(0, 5):
            case 0 if found:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1:
                del found[at : at + rng.randint(1, 40)]
            case 2:
                found[at:at] = rng.randbytes(rng.randint(1, 9))
            case 3:
                found[at:at] = found[: rng.randint(1, 60)]
            case 4:
                odd = (
                    b"9" * 400,
                    b"[" * 5000,
                    b'{"a":' * 3000,
                    b"1e999",
                    b"-1",
                    b"\\ud800",
                    b"null",
                    b"\xed\xa0\x80",
                    b"NaN",
                    b"\0",
                    b"18446744073709551616",
                    *words,
                )
                found[at:at] = rng.choice(odd)
            case _:
                del found[at:]
    return bytes(found)


def tried(
    what: Callable[[], Any], size: int, errors: tuple[type[Exception], ...] = (FedtuneError,)
) -> Any:
    """Run a decoder: its value or its error; check what it took."""
    began = time.monotonic()
    weighed = next(_COUNT) % WEIGHED == 0
    if weighed:
        tracemalloc.start()
    try:
        found = what()
    except errors as error:
        found = error
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * size + ROOM, f"{peak} bytes for {size}"
    assert time.monotonic() - began < SECONDS
    assert not isinstance(found, Exception) or 0 < len(str(found)) < 20_000
    return found

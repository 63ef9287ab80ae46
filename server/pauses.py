"""How long to wait between two questions to Flower's Grid."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["pauses"]


def pauses(least: float = 0.01, most: float = 0.25, factor: float = 1.5) -> Iterator[float]:
    """Yield the seconds to wait between two questions: short at first, then longer.

    Make a new one after news, so that a round's quick answers are taken up quickly
    and an hour of training costs few questions.

    Examples
    --------
    >>> import itertools
    >>> list(itertools.islice(pauses(0.1, 0.4, 2.0), 4))
    [0.1, 0.2, 0.4, 0.4]
    """
    pause = least
    while True:
        yield pause
        pause = min(pause * factor, most)

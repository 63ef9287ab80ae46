"""What makes Flower's Grid quick to answer, without changing what it does."""

from __future__ import annotations

import functools
from collections.abc import Iterator

__all__ = ["hasten", "pauses"]

_FIRST_SECONDS, _MOST_SECONDS = 0.01, 0.5
_TRIES = 20_000
_PULL = "pull_objects"


def hasten() -> None:
    """Let the Grid of this process wait briefly for objects that are still on their way.

    A reply is announced before its objects are there, so the Grid often asks for one a
    moment too early. Flower 1.39 then waits 1 s, 2 s, 4 s (``PULL_INITIAL_BACKOFF``);
    the defaults are bound when ``pull_objects`` is defined and ``HttpGrid`` offers no
    setting, so the one name that it calls is bound anew. Calling this twice does no more.
    """
    from flwr.superlink.grid import http_grid

    pull = getattr(http_grid, _PULL)
    if isinstance(pull, functools.partial):
        return
    # More tries, because each waits less: 500 of half a second would end a slow upload.
    quick = functools.partial(
        pull,
        initial_backoff=_FIRST_SECONDS,
        backoff_cap=_MOST_SECONDS,
        max_tries_per_object=_TRIES,
    )
    setattr(http_grid, _PULL, quick)


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

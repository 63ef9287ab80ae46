from __future__ import annotations

import itertools
import time

from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError
from flwr.superlink.grid import http_grid

from fedtune.server.fast_grid import hasten, pauses


def test_an_object_that_comes_a_moment_later_is_not_waited_for_long() -> None:
    """What the Grid itself calls: Flower's first pause is a second."""
    hasten()
    hasten()
    asked = itertools.count()

    def pull(name: str) -> bytes:
        if next(asked) < 3:
            raise ObjectUnavailableError(name)
        return b"here"

    began = time.monotonic()
    assert http_grid.pull_objects(["a"], pull) == {"a": b"here"}
    assert time.monotonic() - began < 0.5


def test_pauses_grow_to_their_limit() -> None:
    found = list(itertools.islice(pauses(0.01, 0.25, 1.5), 20))
    assert found[0] == 0.01
    assert found == sorted(found)
    assert found[-1] == 0.25

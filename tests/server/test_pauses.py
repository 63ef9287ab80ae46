from __future__ import annotations

import itertools

from fedtune.server.pauses import pauses


def test_pauses_grow_to_their_limit() -> None:
    found = list(itertools.islice(pauses(0.01, 0.25, 1.5), 20))
    assert found[0] == 0.01
    assert found == sorted(found)
    assert found[-1] == 0.25

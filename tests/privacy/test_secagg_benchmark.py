"""The benchmark of secure sums times real sums, and the mask that a client really adds."""

import pytest

from fedtune.simulations.benchmarks.secagg import PEERS, mask_seconds, whole_sum


@pytest.mark.parametrize(("members", "dropped"), [(3, 0), (3, 1), (8, 2)])
def test_a_sum_is_played_to_its_end_and_counted(members: int, dropped: int) -> None:
    cost = whole_sum(members, 1000, dropped)
    assert 0.0 < cost.unmask < cost.server
    assert cost.client > 0.0
    assert 4064 < cost.up < 4064 + 148 * members + 66 * members + 2000
    assert 232 * members < cost.down < 232 * members + 148 * members + 131 * members + 2000


def test_masks_are_timed_for_both() -> None:
    seconds = mask_seconds(200_000, 3)
    assert sorted(seconds) == ["flower", "ours", "ours_alone"]
    assert [len(each) for each in seconds.values()] == [3, 3, 3]
    for clock in (0, 1):
        best = {name: min(turn[clock] for turn in turns) for name, turns in seconds.items()}
        assert best["flower"] > best["ours"] > 0.0
    assert PEERS > 1

"""The engine benchmark times real rounds of the apps it says it times."""

import pytest

from fedtune.simulations.benchmarks.engine import PAYLOADS, time_local


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_a_round_reaches_every_client_and_is_timed(executor: str) -> None:
    timing = time_local(7, PAYLOADS["tiny"], 3, executor)
    assert timing.tasks == 7
    assert len(timing.seconds) == 3
    assert timing.rate() > 0

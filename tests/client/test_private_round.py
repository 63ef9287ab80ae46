"""The clip norm of forward passes between two rounds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.client.policies import keep, recall
from fedtune.client.private_round import norm_of
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.plan import Promise, example_promise
from tests.client.node_kit import EXAMPLE, experiment


@pytest.fixture(scope="module")
def promise() -> Promise:
    found = example_promise(experiment(privacy__example=EXAMPLE | {"clip_norm": 0.7}))
    assert found is not None
    return found


def test_the_first_round_has_that_of_the_settings(promise: Promise, tmp_path: Path) -> None:
    assert norm_of({}, promise) == 0.7
    assert norm_of(recall(tmp_path, 1), promise) == 0.7


def test_what_a_round_left_is_what_the_next_one_has(promise: Promise, tmp_path: Path) -> None:
    for number, norm in ((1, 0.1), (2, 1 / 3)):
        keep(tmp_path, number, {"clip_norm": np.array(norm)}, committed=0)
        assert norm_of(recall(tmp_path, number + 1), promise) == norm
    assert norm_of(recall(tmp_path, 2), promise) == 0.1


@pytest.mark.parametrize("left", [math.nan, math.inf, 0.0, -1.0, [], [0.5, 0.5]], ids=str)
def test_what_is_no_clip_norm_is_refused(left: Any, promise: Promise, tmp_path: Path) -> None:
    keep(tmp_path, 1, {"clip_norm": np.array(left)}, committed=1)
    with pytest.raises(FedtuneError, match="clip_norm=") as caught:
        norm_of(recall(tmp_path, 2), promise)
    assert caught.value.code == ExitCode.RESUME_REFUSED

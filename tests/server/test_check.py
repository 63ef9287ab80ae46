from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtune.adapters import Tensors
from fedtune.server.check import problem_of, problem_of_evaluation
from fedtune.wire import Evaluation, Task, Update

ADAPTER: Tensors = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32)}
TASK = Task(3, 1, 2, 0.1, ADAPTER)
GOOD = Update(3, 1, 10, 2, 0, 1.5, ADAPTER)


def holding(value: float) -> Tensors:
    spoilt = ADAPTER["b"].copy()
    spoilt[2] = value
    return ADAPTER | {"b": spoilt}


def test_a_good_update_has_no_problem() -> None:
    assert problem_of(GOOD, TASK, ADAPTER) == ""
    assert problem_of(replace(GOOD, tensors=holding(-1e9)), TASK, ADAPTER) == ""


@pytest.mark.parametrize(
    ("update", "problem"),
    [
        (replace(GOOD, round=2), "answers round 2.1, asked was 3.1"),
        (replace(GOOD, attempt=0), "answers round 3.0, asked was 3.1"),
        (replace(GOOD, examples=0), "examples=0 is not a weight"),
        (replace(GOOD, examples=-5), "examples=-5 is not a weight"),
        (replace(GOOD, examples=10**9 + 1), "examples=1000000001 is not a weight"),
        (replace(GOOD, tensors={"a": ADAPTER["a"]}), "tensors do not match: ['b']"),
        (replace(GOOD, tensors=ADAPTER | {"c": ADAPTER["b"]}), "tensors do not match: ['c']"),
        (replace(GOOD, tensors={}), "tensors do not match: ['a', 'b']"),
        (
            replace(GOOD, tensors=ADAPTER | {"a": ADAPTER["a"].T}),
            "'a' has shape (3, 2), not (2, 3)",
        ),
        (
            replace(GOOD, tensors=ADAPTER | {"a": ADAPTER["a"].astype(np.float64)}),  # type: ignore[dict-item]
            "'a' is float64, not float32",
        ),
        (
            replace(GOOD, tensors=ADAPTER | {"a": ADAPTER["a"].astype(np.int32)}),  # type: ignore[dict-item]
            "'a' is int32, not float32",
        ),
        (replace(GOOD, tensors=holding(np.nan)), "'b' holds NaN or infinity"),
        (replace(GOOD, tensors=holding(1e10)), "'b' holds values above 1e+09"),
        (replace(GOOD, tensors=holding(-3e38)), "'b' holds values above 1e+09"),
        (replace(GOOD, tensors=holding(np.inf)), "'b' holds NaN or infinity"),
        (
            replace(GOOD, tensors=ADAPTER | {"b": np.float32([np.inf, -np.inf, 0, 0])}),
            "'b' holds NaN or infinity",
        ),
    ],
)
def test_a_bad_update_is_named(update: Update, problem: str) -> None:
    assert problem_of(update, TASK, ADAPTER) == problem


def found(**changes: object) -> Evaluation:
    confusion = np.array([[3, 1], [0, 2]], dtype=np.int64)
    whole = Evaluation(3, 4.5, 6, 5, 6, {"confusion": confusion})
    return replace(whole, **changes)  # type: ignore[arg-type]


TEXT = {"confusion": np.zeros((0, 0), np.int64)}


def test_good_counts_have_no_problem() -> None:
    assert problem_of_evaluation(found(), TASK, 2) == ""
    assert problem_of_evaluation(found(tensors=TEXT), TASK, 0) == ""
    nothing = found(loss=0.0, units=0, correct=0, examples=0, tensors=TEXT)
    assert problem_of_evaluation(nothing, TASK, 0) == ""


@pytest.mark.parametrize(
    ("evaluation", "labels", "problem"),
    [
        (found(round=1), 2, "answers round 1, asked was 3"),
        (found(correct=7), 2, "counts cannot be: 7 of 6 right"),
        (found(correct=-1), 2, "counts cannot be: -1 of 6 right"),
        (found(units=-1, correct=-1), 2, "counts cannot be"),
        (found(examples=-1), 2, "counts cannot be"),
        (found(loss=-0.5), 2, "loss -0.5"),
        (found(tensors={}), 2, "has no confusion matrix of int64"),
        (found(tensors=TEXT | {"x": TEXT["confusion"]}), 0, "has no confusion matrix of int64"),
        (
            found(tensors={"confusion": np.zeros((2, 2))}),
            2,
            "has no confusion matrix of int64",
        ),
        (found(), 3, "confusion matrix has shape (2, 2), not (3, 3)"),
        (found(), 0, "confusion matrix has shape (2, 2), not (0, 0)"),
        (found(tensors=TEXT), 2, "confusion matrix has shape (0, 0), not (2, 2)"),
        (found(tensors={"confusion": np.array([[7, -1], [0, 0]])}), 2, "confusion matrix"),
        (found(units=7), 2, "confusion matrix counts 6, not 7"),
    ],
)
def test_bad_counts_are_named(evaluation: Evaluation, labels: int, problem: str) -> None:
    assert problem in problem_of_evaluation(evaluation, TASK, labels)

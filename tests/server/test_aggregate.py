from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtune.adapters import Pair, Tensors
from fedtune.server.aggregate import Cohort, Products, exact_residual, recompress
from fedtune.server.link import Answer
from fedtune.server.rounds import Member, _in_order
from fedtune.wire import Update

PAIRS = (Pair("one", "one.A", "one.B", 2.0), Pair("two", "two.A", "two.B", 0.5))
SHAPES = {"one.A": (2, 9), "one.B": (12, 2), "two.A": (3, 10), "two.B": (6, 3), "head": (4,)}
Matrix = NDArray[np.float64]


def random(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Tensors:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}


def cohort(weights: list[float]) -> tuple[Cohort, Tensors, list[Tensors]]:
    """Return a cohort, where it started, and each client's own adapter."""
    start = random(100)
    made, each = Cohort(start, PAIRS), []
    for seed, weight in enumerate(weights):
        delta = random(seed)
        made.add(weight, delta)
        each.append({name: start[name] + delta[name] for name in start})
    return made, start, each


def dense_mean(each: list[Tensors], weights: list[float], pair: Pair) -> Matrix:
    products = [pair.scale * c[pair.b].astype(np.float64) @ c[pair.a] for c in each]
    found: Matrix = np.average(products, axis=0, weights=weights)
    return found


def averaged(made: Cohort, start: Tensors) -> Tensors:
    mean = made.mean()
    return {name: start[name] + mean[name] for name in start}


CASES = ([1.0, 1.0], [3.0, 1.0, 10.0], [5.0], [float(n) for n in range(1, 30)])


@pytest.mark.parametrize("weights", CASES, ids=len)
def test_the_mean_is_the_weighted_mean(weights: list[float]) -> None:
    made, start, each = cohort(weights)
    for name, value in made.mean().items():
        assert value.dtype == np.float32
        wanted = np.average([c[name] - start[name] for c in each], axis=0, weights=weights)
        np.testing.assert_allclose(value, wanted, atol=1e-6)
    assert (made.weight, made.count) == (sum(weights), len(weights))


@pytest.mark.parametrize("weights", CASES, ids=len)
def test_what_is_missing_makes_the_mean_of_products_exact(weights: list[float]) -> None:
    made, start, each = cohort(weights)
    mean = averaged(made, start)
    missing = made.missing(mean)
    residual, lost = exact_residual({}, missing, 0)
    assert lost == 0.0
    error = size = 0.0
    total = sum(weights)
    for pair in PAIRS:
        wanted = dense_mean(each, weights, pair)
        ours = pair.scale * mean[pair.b] @ mean[pair.a]
        for u, v in (missing[pair.layer], residual[pair.layer]):
            assert u.dtype == v.dtype == np.float32
            np.testing.assert_allclose(ours + u @ v, wanted, atol=3e-5)
        # The between-client covariance: an independent formula.
        covariance = sum(
            w / total * pair.scale * (c[pair.b] - mean[pair.b]) @ (c[pair.a] - mean[pair.a])
            for w, c in zip(weights, each, strict=True)
        )
        np.testing.assert_allclose(wanted - ours, covariance, atol=3e-5)
        error += float(np.square(wanted - ours).sum())
        size += float(np.square(wanted).sum())
    found = made.relative_error(mean)
    assert found == pytest.approx(np.sqrt(error / size), rel=1e-4, abs=1e-6)
    assert (found > 0.1) == (len(weights) > 1)


def test_one_client_is_taken_as_it_is() -> None:
    made, start, each = cohort([7.0])
    mean = averaged(made, start)
    for name in start:
        np.testing.assert_allclose(mean[name], each[0][name], atol=1e-6)
    assert made.relative_error(mean) < 1e-6
    for u, v in exact_residual({}, made.missing(mean), 0)[0].values():
        assert float(np.abs(u @ v).max()) < 1e-6 * 20


def test_nothing_to_compare_is_no_error() -> None:
    start = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    made = Cohort(start, PAIRS)
    made.add(1.0, start)
    assert made.relative_error(start) == 0.0
    residual, lost = exact_residual({}, made.missing(start), 0)
    assert lost == 0.0
    assert all(not (u @ v).any() for u, v in residual.values())
    assert Cohort(start, ()).relative_error(start) == 0.0


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize(("rows", "columns"), [(12, 9), (5, 30), (30, 5)])
def test_products_of_other_ranks_and_scales_add_up(count: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(count)
    total, wanted = Products(), np.zeros((rows, columns))
    assert total.norm() == 0.0
    for index in range(count):
        rank, weight = 1 + index % 4, 0.1 + index
        scale = 16.0 / rank
        b = rng.standard_normal((rows, rank)).astype(np.float32)
        a = rng.standard_normal((rank, columns)).astype(np.float32)
        total.add(weight * scale, b, a)
        wanted += weight * scale * b.astype(np.float64) @ a.astype(np.float64)
        held = sum(x.size for x in (*total._left, *total._right))
        held += total._dense.size if total._dense is not None else 0
        # One product of rank 4 more than the dense matrix may be held while it is added.
        assert held <= 2 * rows * columns
        if total._dense is None:
            assert held <= rows * columns
    np.testing.assert_allclose(total.dense(), wanted, rtol=1e-12, atol=1e-9)
    assert total.norm() == pytest.approx(np.linalg.norm(wanted), rel=1e-9)
    b, a = rng.standard_normal((rows, 2)), rng.standard_normal((2, columns))
    u, v = total.minus(b, a)
    np.testing.assert_allclose(u @ v, wanted - b @ a, rtol=1e-9, atol=1e-9)
    assert u.shape[1] <= min(rows, columns)


def test_products_go_dense_when_factors_are_larger() -> None:
    rng = np.random.default_rng(0)
    total = Products()
    for index in range(50):
        total.add(1.0, rng.standard_normal((8, 2)), rng.standard_normal((2, 8)))
        assert (total._dense is None) == (index < 2)


def test_a_residual_adds_to_the_one_before() -> None:
    old, _ = exact_residual({}, {"one": (np.ones((5, 1), np.float32), np.eye(1, 4))}, 0)
    rng = np.random.default_rng(0)
    u, v = (rng.standard_normal(s).astype(np.float32) for s in ((5, 2), (2, 4)))
    both, lost = exact_residual(old, {"one": (u, v)}, 0)
    wanted = np.ones((5, 1)) @ np.eye(1, 4) + u @ v
    np.testing.assert_allclose(both["one"][0] @ both["one"][1], wanted, atol=1e-5)
    assert lost == 0.0
    # Many rounds do not make it larger than its rank can be.
    for _ in range(20):
        both, _ = exact_residual(both, {"one": (u, v)}, 0)
    assert both["one"][0].shape[1] <= 4


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_a_cut_residual_is_the_best_and_tells_what_it_lost(limit: int) -> None:
    rng = np.random.default_rng(3)
    missing = {
        name: (rng.standard_normal((7, 5)).astype(np.float32), rng.standard_normal((5, 6)))
        for name in ("x", "y")
    }
    residual, lost = exact_residual({}, missing, limit)
    cut = whole = 0.0
    for name, (u, v) in missing.items():
        values = np.linalg.svd(u.astype(np.float64) @ v, compute_uv=False)
        left, right = residual[name]
        assert left.shape == (7, limit)
        off = np.linalg.norm(left.astype(np.float64) @ right - u @ v)
        assert off == pytest.approx(np.linalg.norm(values[limit:5]), abs=1e-5)
        cut += float(np.square(values[limit:5]).sum())
        whole += float(np.square(values).sum())
    assert lost == pytest.approx(np.sqrt(cut / whole), abs=1e-6)
    assert (lost == 0.0) == (limit == 5)


def test_recompressing_finds_the_smallest_rank() -> None:
    rng = np.random.default_rng(1)
    u, v = rng.standard_normal((20, 2)), rng.standard_normal((2, 15))
    left, right, cut, whole = recompress(np.hstack([u, u, u]), np.vstack([v, v, -v]), 0)
    assert (left.shape, right.shape, cut) == ((20, 2), (2, 15), 0.0)
    np.testing.assert_allclose(left @ right, u @ v, atol=1e-5)
    assert whole == pytest.approx(np.linalg.norm(u @ v))
    left, right, cut, whole = recompress(np.zeros((4, 2)), np.zeros((2, 3)), 0)
    assert (left.shape, cut, whole) == ((4, 1), 0.0, 0.0)


def answers_of(members: list[Member]) -> list[Answer[Update]]:
    return [
        Answer(m.node, Update(1, 0, 3 + m.node, 1, 0, 1.0, random(m.node)), "", 10) for m in members
    ]


def test_the_order_of_arrival_does_not_change_a_bit() -> None:
    members = [Member(f"c{n}", 10 + n, 5) for n in range(5)]
    answers = answers_of(members)
    found = set()
    for order in itertools.permutations(answers):
        made = Cohort(random(100), PAIRS)
        seen = []
        for member, answer in _in_order(members, iter(order)):
            assert answer is not None
            assert answer.node == member.node
            assert answer.value is not None
            seen.append(member.client)
            made.add(float(answer.value.examples), answer.value.tensors)
        assert seen == ["c0", "c1", "c2", "c3", "c4"]
        residual, _ = exact_residual({}, made.missing(averaged(made, random(100))), 0)
        parts = [*made.mean().values(), *itertools.chain.from_iterable(residual.values())]
        found.add(b"".join(part.tobytes() for part in parts))
    assert len(found) == 1


def test_answers_are_given_on_as_early_as_their_order_allows() -> None:
    members = [Member(f"c{n}", 10 + n, 5) for n in range(4)]
    answers = answers_of(members)
    heard: list[int] = []

    def arriving() -> itertools.chain[Answer[Update]]:
        def one(index: int) -> Answer[Update]:
            heard.append(index)
            return answers[index]

        return itertools.chain(one(index) for index in (1, 0, 3))

    given = _in_order(members, arriving())
    assert next(given) == (members[0], answers[0])
    assert heard == [1, 0]
    assert next(given) == (members[1], answers[1])
    assert heard == [1, 0]
    # The third is late, so the fourth waits for the end.
    assert list(given) == [(members[2], None), (members[3], answers[3])]
    assert list(_in_order(members, iter(()))) == [(member, None) for member in members]

"""Every planted bug is caught by the check that is named for it, the right programs by none."""

from functools import partial

import numpy as np
import pytest

from fedtune.privacy.events import PoissonGaussian, Relation, TruncatedPoissonGaussian, Unit
from fedtune.privacy.mechanism import Block, Mechanism
from fedtune.privacy.noise import SecureNoise
from fedtune.privacy.replay import Draw, Stage, Trace, record, replay
from fedtune.privacy.replay_checks import (
    CHECKS,
    Finding,
    Pair,
    audit,
    books,
    compare,
    extremes,
    neighbours,
    noise,
    sampler,
)
from fedtune.privacy.sampling import Everyone, Poisson
from tests.privacy.planted import (
    RIGHT,
    RIGHT_BOOKS,
    RIGHT_FIVES,
    SERVE,
    TRAIN,
    Pieces,
    Server,
    clients,
    people,
    serve,
    train,
)

TWELVE = {
    "missing-noise",
    "noise-over-2",
    "clip-of-the-mean",
    "shuffling-for-poisson",
    "seed-reuse",
    "per-layer-clip-at-global-norm",
    "nan",
    "data-dependent-denominator",
    "empty-batch-skipped",
    "un-noised-metric",
    "weights-by-example-count",
    "reset-on-resume",
}


def _audit_training(pieces: Pieces, seed: int) -> list[Finding]:
    rows = people(seed)
    run = partial(train, pieces=pieces, seed=seed)
    units = extremes(rows[0])
    # nobody against one: a single kind is enough; and the books do not look at the data
    most = 2 if pieces.books else len(units) + 2
    return audit(run, neighbours(rows, dict(units))[:most])


def _audit_server(pieces: Server, seed: int) -> list[Finding]:
    given = clients(seed)
    units = {name: (value, 10_000) for name, value in extremes(given[0][0]).items()}
    return audit(partial(serve, pieces=pieces), neighbours(given, units))


def test_the_twelve_bugs_are_planted() -> None:
    assert {*TRAIN, *SERVE} >= TWELVE
    assert {check for check, _ in (*TRAIN.values(), *SERVE.values())} == set(CHECKS)


@pytest.mark.parametrize("seed", range(3))
def test_v40_right_programs_pass_every_check(seed: int) -> None:
    assert _audit_training(RIGHT, seed) == []
    assert _audit_training(RIGHT_FIVES, seed) == []
    assert _audit_training(RIGHT_BOOKS, seed) == []
    assert _audit_server(Server(), seed) == []


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("bug", TRAIN)
def test_a_planted_bug_in_training_is_caught_by_its_check(bug: str, seed: int) -> None:
    check, pieces = TRAIN[bug]
    assert {finding.check for finding in _audit_training(pieces, seed)} == {check}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("bug", SERVE)
def test_a_planted_bug_in_the_server_is_caught_by_its_check(bug: str, seed: int) -> None:
    check, pieces = SERVE[bug]
    assert {finding.check for finding in _audit_server(pieces, seed)} == {check}


# ---------------------------------------------------------------- the harness itself


def _mechanism(z: float = 1.0, q: float = 0.1) -> Mechanism:
    return Mechanism(Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, Poisson(q), z, 10.0)


def _release(stage: Stage, value: float, clip: float = 1.0, size: int = 4) -> None:
    mechanism = stage.watch(_mechanism())
    blocks = mechanism.blocks_flat(("x",), clip)
    mechanism.release({"x": np.full(size, value)}, blocks, SecureNoise())


def test_a_replay_gives_what_was_recorded_and_draws_nothing() -> None:
    seen = []

    def run(stage: Stage, data: list[float]) -> None:
        mechanism = stage.watch(_mechanism(q=0.5))
        drawn = mechanism.draw(len(data), SecureNoise())
        out = mechanism.release(
            {"x": np.zeros(3)}, mechanism.blocks_flat(["x"], 1.0), SecureNoise()
        )
        seen.append((drawn.tolist(), out["x"].tolist()))

    tape = record(run, [0.0] * 50)
    replay(run, [0.0] * 51, tape)
    replay(run, [0.0] * 49, tape)
    (drawn, out), (more, same), (fewer, again) = seen
    assert out == same == again
    assert more == [*drawn, 50]
    assert fewer == [i for i in drawn if i < 49]
    assert replay(run, [0.0] * 53, tape).outcome.startswith("_DivergedError")


@pytest.mark.parametrize(
    ("one", "two", "check"),
    [
        (lambda s: _release(s, 0.0), lambda s: _release(s, 0.49), None),
        (lambda s: _release(s, 0.0), lambda s: _release(s, 0.51), "sensitivity"),
        (lambda s: _release(s, 0.0), lambda s: _release(s, np.nan), "sensitivity"),
        (lambda s: _release(s, 0.0), lambda s: _release(s, np.inf), "sensitivity"),
        (lambda s: _release(s, 0.0), lambda s: _release(s, 0.0, clip=0.5), "declared"),
        (lambda s: _release(s, 0.0), lambda s: _release(s, 0.0, size=5), "declared"),
        (lambda s: _release(s, 0.0), lambda s: None, "control-flow"),
        (lambda s: None, lambda s: _release(s, 0.0), "control-flow"),
        (lambda s: s.emit("a", {"x": [1]}), lambda s: s.emit("a", {"x": [1]}), None),
        (lambda s: s.emit("a", {"x": [1]}), lambda s: s.emit("a", {"x": [2]}), "messages"),
        (lambda s: s.emit("a", 1), lambda s: s.emit("b", 1), "messages"),
        (lambda s: s.emit("a", 1), lambda s: s.emit("a", 1.0), "messages"),
        (lambda s: s.emit("a", b"1"), lambda s: None, "messages"),
        (lambda s: s.emit("a", np.zeros(2)), lambda s: s.emit("a", np.zeros((2, 1))), "messages"),
        (lambda s: 1, lambda s: 2, "messages"),
        (lambda s: print("x"), lambda s: None, "logs"),
    ],
)
def test_what_differs_is_found_and_named(one, two, check) -> None:  # type: ignore[no-untyped-def]
    tape = record(lambda stage, data: data(stage), one)
    found = {finding.check for finding in compare(tape, replay(lambda s, d: d(s), two, tape))}
    assert (found == {check}) if check else (found == set())


def test_one_of_several_blocks_may_not_take_the_share_of_another() -> None:
    def run(stage: Stage, value: float) -> None:
        mechanism = stage.watch(_mechanism())
        names = {("a",): 1.0, ("b",): 1.0}
        blocks = mechanism.blocks_weighted(names, dict.fromkeys(names, 0.5))
        mechanism.release({"a": np.array([value]), "b": np.array([value])}, blocks, SecureNoise())

    tape = record(run, 0.0)
    assert compare(tape, replay(run, 1.0, tape)) == []
    assert [f.check for f in compare(tape, replay(run, 1.1, tape))].count("sensitivity") == 3


def test_a_program_without_a_release_does_not_pass() -> None:
    found = audit(lambda stage, data: None, [Pair("nothing", [], [1])])
    assert [finding.check for finding in found] == ["control-flow"]


def test_noise_that_was_declared_too_small_is_found() -> None:
    class Lenient:
        """A mechanism without the check of its blocks."""

        event = PoissonGaussian(0.1, 1.0)
        denominator, margin = 1.0, 0.0

        def release(self, sums, blocks, source, apart=()):  # type: ignore[no-untyped-def]
            return {"x": np.asarray(source.normal(100) * blocks[0].sigma, np.float32)}

    def run(stage: Stage, data: object) -> None:
        mechanism = stage.watch(Lenient())
        mechanism.release({"x": np.zeros(100)}, (Block(("x",), 1.0, 0.9),), SecureNoise())

    assert [finding.check for finding in noise([record(run, None)])] == ["declared"]


def _drawn(event: object, n: int, sizes: list[int]) -> Trace:
    return Trace([Draw(event, n, np.arange(size)) for size in sizes])  # type: ignore[arg-type]


def test_v15_a_sampler_is_judged_by_the_law_it_declares() -> None:
    rng = np.random.default_rng(0)
    coins = rng.binomial(500, 0.1, 40).tolist()
    assert sampler([_drawn(PoissonGaussian(0.1, 1.0), 500, coins)]) == []
    assert sampler([_drawn(PoissonGaussian(0.1, 1.0), 500, [50] * 40)]) != []
    assert sampler([_drawn(PoissonGaussian(0.05, 1.0), 500, coins)]) != []
    assert sampler([_drawn(PoissonGaussian(0.1, 1.0), 500, [50] * 5)]) == []  # too few to judge
    assert sampler([_drawn(Everyone().event(1.0), 7, [7, 7])]) == []
    assert sampler([_drawn(Everyone().event(1.0), 7, [7, 6])]) != []
    capped = TruncatedPoissonGaussian(0.1, 1.0, 500, 60)
    assert sampler([_drawn(capped, 500, [min(size, 60) for size in coins])]) == []
    assert sampler([_drawn(capped, 500, [61])]) != []
    assert sampler([_drawn(capped, 501, [50])]) != []


@pytest.mark.parametrize(
    ("spent", "sound"),
    [
        ([(0, 1), (1, 1), (1, 2), (2, 2)], True),
        ([(0, 5), (5, 9)], True),
        ([(1, 0)], False),
        ([(1, 5), (2, 4)], False),
        ([(5, 5), (6, 1)], False),
    ],
)
def test_v29_books_that_forget_or_lag_are_found(spent: list[tuple[int, int]], sound: bool) -> None:
    assert (books(Trace(spent=spent)) == []) is sound

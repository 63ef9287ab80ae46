"""The learning benchmark: its arithmetic, its arms, and one tiny run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedtune.config import ProbeConfig, TuningConfig
from fedtune.simulations.benchmarks import zo_error, zo_parts, zo_report
from fedtune.simulations.benchmarks.zo_arms import (
    Arm,
    passes_of_step,
    reach,
    run,
    settings,
    short,
    speeches,
)


def curve(*losses: float) -> list[dict[str, float]]:
    return [
        {"round": i, "loss": loss, "passes": 10.0 * i, "examples": 20.0 * i, "bytes": 5.0 * i}
        for i, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("probe", "passes"),
    [
        (ProbeConfig(), 2),
        (ProbeConfig(count=4), 8),
        (ProbeConfig(count=4, sides="one"), 5),
        (ProbeConfig(count=4, step="curvature"), 9),
    ],
)
def test_forward_passes_are_counted(probe: ProbeConfig, passes: int) -> None:
    assert passes_of_step(TuningConfig(method="mezo", probe=probe)) == (passes, 0)
    twice = TuningConfig(method="mezo", probe=probe, accumulate=2)
    assert passes_of_step(twice) == (2 * passes, 0)


def test_where_a_curve_first_gets() -> None:
    found = curve(4.0, 3.0, 3.5, 2.0)
    assert reach(found, 3.0, "passes") == 10.0
    assert reach(found, 3.5, "examples") == 10.0
    assert math.isinf(reach(found, 1.0, "bytes"))


def test_the_asked_ratios_come_from_means_over_seeds() -> None:
    arms = [Arm("a", name, name, "x") for name in ("fedkseed", "probes", "projected", "lora")]
    rows = [
        {"part": "a", "arm": name, "seed": seed, "seconds": 1.0, "curve": curve(4.0, *rest)}
        for seed in range(2)
        for name, rest in {
            "fedkseed": (3.5, 3.0 + seed), "probes": (3.5, 3.0), "projected": (3.0, 2.0),
            "lora": (3.0, 2.5),
        }.items()
    ]  # fmt: skip
    found = zo_report.figures(rows, arms)
    assert found["projected_over_lora"] == pytest.approx(0.8)
    assert found["probes_over_fedkseed_passes"] == pytest.approx(0.5)
    assert found["a_fedkseed_loss"] == pytest.approx(3.5)
    zo_report.table(rows, arms, "title")


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    arms = [Arm("a", "one", "One", "x")]
    rows = [{"part": "a", "arm": "one", "seed": 0, "seconds": 1.0, "curve": curve(4.0, 3.0)}]
    zo_report.draw(rows, arms, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_every_arm_is_a_valid_experiment(tmp_path: Path, shared: Path) -> None:
    names = [(arm.part, arm.name) for arm in zo_parts.ARMS]
    assert len(set(names)) == len(names)
    for arm in zo_parts.ARMS:
        config = settings(arm, 3, tmp_path)
        assert config.seed == 3
        assert config.privacy.on == arm.private
        settings(short(arm), 3, tmp_path)


def test_public_speeches_are_nobodys(tmp_path: Path, shared: Path) -> None:
    mine, public = speeches(tmp_path)
    text = (shared / "data" / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    said = text.split("\n\n")
    assert mine.read_text(encoding="utf-8").split("\n\n") == [
        s for i, s in enumerate(said) if i % 10
    ]
    assert public.read_text(encoding="utf-8").split("\n\n") == said[::40]


def test_one_tiny_run_is_counted(tmp_path: Path, shared: Path) -> None:
    arm = short(Arm("a", "tiny", "Tiny", "shakespeare_seedpool",
                    ("tuning.pool.engine=probes", "tuning.pool.size=64", "tuning.batch_size=1",
                     "tuning.probe.count=2", "data.partition.clients=3",
                     "data.max_length=16")))  # fmt: skip
    found = run(arm, 1, tmp_path)
    final = found["curve"][-1]
    assert final["round"] == 2
    assert final["passes"] == 2 * 3 * 2 * 4
    assert final["examples"] == final["passes"]
    assert final["bytes"] > 0
    assert json.loads(json.dumps(found))["curve"][0]["loss"] > 3.0
    assert not list((tmp_path / "runs").glob("*tiny*"))


def test_the_formula_holds_on_a_released_sum(tmp_path: Path, shared: Path) -> None:
    # 24 x 16 squares of Gaussians: their mean has a spread of 7 %
    case = zo_error.Case(clients=6, directions=16, epsilon=8.0, rounds=24)
    measured, made = zo_error.measured_error(case, tmp_path)
    assert measured == pytest.approx(made.error, rel=0.35)

"""What the status page and the metrics say, and that names are text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedtune.server.snapshot import NodeView, Snapshot, Trouble, snapshot_of
from fedtune.server.status_chart import chart_of
from fedtune.server.status_metrics import metrics_of
from fedtune.server.status_page import Status
from fedtune.server.status_view import page_of
from tests.server.standing import CLIENT, HOSTILE, Run
from tests.server.status_kit import LONG, ask, standing

# ---------------------------------------------------------------- names of others


@pytest.mark.parametrize(
    "name", [HOSTILE, '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "\u202eevil", "שלום", LONG,
             "</title><script>", "<!--", "&lt;b&gt;"],
    ids=["script", "attribute", "template", "turned", "hebrew", "long", "title", "comment",
         "entity"],
)  # fmt: skip
def test_names_are_text(name: str, tmp_path: Path) -> None:
    found = standing(tmp_path)
    clean = snapshot_of(
        None, [NodeView(name, "online", note=name)], federation=name, address=name, queue=[name],
        troubles=[Trouble(1.0, 1, name, name)],
    )  # fmt: skip
    # What did not come through the reader must be escaped all the same.
    raw = replace(
        found, federation=name, experiment=name, run=name, reason=name, phase=name, address=name,
        nodes=(NodeView(name, "online", 1.0, 1, 1, 1, name),), queue=(name,),
        troubles=(Trouble(1.0, 1, name, name),), status="failed",
    )  # fmt: skip
    for one in (clean, raw):
        text = page_of(one, "nonce")
        assert re.findall(r"<(script|img)\b[^>]*>", text) == ["script"]
        assert "<!--" not in text
        assert "{{ 7 * 7 }}" in text or "{" not in name
    assert "\u202e" not in page_of(clean, "nonce")
    assert LONG[:301] not in page_of(clean, "nonce")


# ---------------------------------------------------------------- states


def test_states_without_much_to_show(tmp_path: Path) -> None:
    empty = page_of(snapshot_of(None), "n")
    for words in ("no run yet", "Nothing measured yet.", "Nobody is enrolled yet", "None so far."):
        assert words in empty
    run = Run(tmp_path)
    run.folder.update_status(status="failed", reason="no client can take part: all are asleep")
    failed = page_of(run.look(), "n")
    assert 'role="alert">no client can take part: all are asleep' in failed
    assert "This run promises nothing" in failed
    old = page_of(replace(run.look(), certificate_days_left=-2), "n")
    assert "has expired" in old
    assert "ends in 5 days" in page_of(replace(run.look(), certificate_days_left=5), "n")


def test_over_budget_and_without_bound(tmp_path: Path) -> None:
    found = standing(tmp_path)
    (budget,) = found.budgets
    over = page_of(replace(found, budgets=(replace(budget, epsilon=9.0),)), "n")
    assert 'class="bad">ε ≤ 9.00' in over
    assert 'aria-valuenow="100"' in over
    never = page_of(
        replace(found, budgets=(replace(budget, epsilon=float("inf"), limit=None),)), "n"
    )
    assert "no bound" in never
    assert "no limit set" in never


def test_a_secret_cohort_is_not_on_the_page(tmp_path: Path) -> None:
    found = standing(tmp_path, client=CLIENT)
    text = page_of(replace(found, nodes=()), "n")
    assert "ward-a" not in text
    assert "out of memory" not in text
    assert "server&#39;s secret" in text or "server's secret" in text
    assert '<th scope="col">Answers' not in page_of(found, "n").partition('id="nodes"')[2]


def test_a_run_of_many_rounds_and_nodes_stays_small(tmp_path: Path) -> None:
    run = Run(tmp_path, rounds=5000)
    for number in range(5001):
        run.folder.append(
            {"round": number, "loss": 1.0 + 1 / (number + 1)}, []
        ) if not number else (None)
    rows = [{"round": n, "loss": 1.0 + 1 / (n + 1), "clients_ok": 3} for n in range(5001)]
    nodes = tuple(NodeView(f"node-{n:04d}", "online", 1.0) for n in range(1000))
    found = replace(run.look(), rows=tuple(rows), nodes=nodes, round=5000)
    text = page_of(found, "n")
    assert "and 800 more" in text
    assert "The newest 10 of 5001" in text
    assert len(text) < 150_000


def test_the_curve_stands_where_the_numbers_are() -> None:
    rows = [{"round": n, "loss": loss} for n, loss in enumerate([4.0, 3.0, None, 2.0])]
    chart = chart_of(rows, 4, 400, 200)
    assert chart is not None
    (line,) = chart.lines
    points = [tuple(map(float, pair.split(","))) for pair in line.points.split()]
    assert len(points) == 3
    across = (chart.right - chart.left) / 4
    assert [x for x, _ in points] == pytest.approx([chart.left + n * across for n in (0, 1, 3)])
    ticks = {label: y for y, label in chart.y_ticks}
    assert [y for _, y in points] == pytest.approx([ticks["4.0"], ticks["3.0"], ticks["2.0"]])
    assert chart.words == "held-out loss from 4 (round 0) to 2 (round 3)"
    assert chart_of([{"round": 0}], 4, 400, 200) is None
    assert chart_of([{"round": 0, "loss": float("nan")}], 4, 400, 200) is None


def test_a_curve_of_many_points_is_thinned_and_keeps_the_newest() -> None:
    rows = [{"round": n, "loss": 5.0 - n / 3000} for n in range(3001)]
    chart = chart_of(rows, 3000, 700, 200)
    assert chart is not None
    (line,) = chart.lines
    assert len(line.points.split()) <= 240
    assert (line.last, line.x) == (4.0, chart.right)


# ---------------------------------------------------------------- metrics


def scrape(snapshot: Snapshot) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(metrics_of(snapshot).decode())
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in families for sample in family.samples
    }  # fmt: skip


def test_prometheus_reads_it(tmp_path: Path, serve: Callable[..., Status]) -> None:
    found = standing(tmp_path)
    answer, text = ask(serve(found), "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    metrics = scrape(found)
    assert text.encode() == metrics_of(found)
    assert metrics["fedtune_up", ""] == 1
    assert metrics["fedtune_running", ""] == 1
    assert (metrics["fedtune_round", ""], metrics["fedtune_rounds", ""]) == (2, 4)
    assert metrics["fedtune_loss", "held_out"] == 4.0
    assert metrics["fedtune_loss", "training"] == pytest.approx(3.9)
    assert metrics["fedtune_bytes_total", "down"] == 6_000_000
    assert metrics["fedtune_bytes_total", "up"] == 4_000_000
    assert metrics["fedtune_epsilon", "example"] == found.budgets[0].epsilon
    assert metrics["fedtune_epsilon_limit", "example"] == 8.0
    assert [metrics["fedtune_nodes", s] for s in ("online", "offline", "never", "revoked")] == [
        1, 1, 1, 1,
    ]  # fmt: skip
    assert metrics["fedtune_answers_total", "ok"] == 3
    assert metrics["fedtune_answers_total", "failed"] == 1
    assert metrics["fedtune_round_seconds", ""] == 2.0
    assert "ward" not in text
    assert metrics == scrape(found), "a second scrape adds nothing up"


def test_metrics_leave_out_what_is_secret_or_unknown(tmp_path: Path) -> None:
    metrics = scrape(standing(tmp_path, client=CLIENT))
    assert not any("bytes" in name or "answers" in name for name, _ in metrics)
    assert ("fedtune_epsilon", "client") in metrics
    bare = scrape(snapshot_of(None))
    assert (bare["fedtune_up", ""], bare["fedtune_running", ""]) == (1, 0)
    assert not any("loss" in name or "seconds" in name for name, _ in bare)

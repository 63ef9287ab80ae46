"""A run's numbers for Prometheus, in its text format. Nothing in it names a node."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedtune.server.snapshot import Snapshot

__all__ = ["CONTENT_TYPE", "metrics_of"]

_OUTCOMES = ("ok", "late", "failed", "dropped")
_STATUSES = ("online", "offline", "never", "revoked")


def metrics_of(snapshot: Snapshot) -> bytes:
    """Return one scrape.

    ``fedtune_round``, ``fedtune_rounds``, ``fedtune_loss{kind}`` (nats),
    ``fedtune_bytes_total{direction}`` (bytes), ``fedtune_epsilon{unit}``,
    ``fedtune_epsilon_limit{unit}``, ``fedtune_nodes{status}``,
    ``fedtune_answers_total{outcome}``, ``fedtune_round_seconds`` (s),
    ``fedtune_certificate_days_left`` (days), ``fedtune_running`` and ``fedtune_up`` (0 or 1).
    What a run does not know, or keeps secret, is not there.
    """
    registry = CollectorRegistry()
    registry.register(_Scrape(snapshot))
    return generate_latest(registry)


class _Scrape(Collector):
    """Fresh for every scrape: nothing is added up here that the run's files do not say."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._of = snapshot

    def collect(self) -> Iterator[Metric]:
        of, rows = self._of, self._of.rows
        yield GaugeMetricFamily("fedtune_up", "The status page answers.", 1)
        running = of.status == "running"
        yield GaugeMetricFamily("fedtune_running", "A run is under way.", int(running))
        yield GaugeMetricFamily("fedtune_round", "Last round that counts.", of.round)
        yield GaugeMetricFamily("fedtune_rounds", "Rounds of this run.", of.rounds)
        loss = GaugeMetricFamily("fedtune_loss", "Loss in nats.", labels=["kind"])
        for kind, key in (("held_out", "loss"), ("training", "train_loss")):
            if (last := _last(of, key)) is not None:
                loss.add_metric([kind], last)
        yield loss
        yield from _traffic(of)
        yield from _budgets(of)
        nodes = GaugeMetricFamily("fedtune_nodes", "Enrolled nodes.", labels=["status"])
        counts = Counter(str(node.status) for node in of.nodes)
        for status in _STATUSES:
            nodes.add_metric([status], counts[status])
        yield nodes
        if rows and (seconds := rows[-1].get("seconds")) is not None:
            yield GaugeMetricFamily("fedtune_round_seconds", "Of the last round.", seconds)
        if (days := of.certificate_days_left) is not None:
            yield GaugeMetricFamily("fedtune_certificate_days_left", "Of the server's.", days)


def _traffic(of: Snapshot) -> Iterator[Metric]:
    sent = CounterMetricFamily("fedtune_bytes", "Training messages.", labels=["direction"])
    for direction, count in (("down", of.bytes_down), ("up", of.bytes_up)):
        if count is not None:
            sent.add_metric([direction], count)
    yield sent
    answers = CounterMetricFamily("fedtune_answers", "Of nodes asked.", labels=["outcome"])
    for outcome in _OUTCOMES if not of.secret else ():
        key = f"clients_{outcome}"
        answers.add_metric([outcome], sum(row.get(key) or 0 for row in of.rows))
    yield answers


def _budgets(of: Snapshot) -> Iterator[Metric]:
    spent = GaugeMetricFamily("fedtune_epsilon", "Upper bound so far.", labels=["unit"])
    limits = GaugeMetricFamily("fedtune_epsilon_limit", "Of this run.", labels=["unit"])
    for budget in of.budgets:
        spent.add_metric([budget.unit], budget.epsilon)
        if budget.limit is not None:
            limits.add_metric([budget.unit], budget.limit)
    yield spent
    yield limits


def _last(of: Snapshot, key: str) -> float | None:
    for row in reversed(of.rows):
        if (value := row.get(key)) is not None and math.isfinite(value):
            return float(value)
    return None

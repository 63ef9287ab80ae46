"""How a run stands, as one value: built from what is on disk, shown by pages and terminals.

Nothing here asks the round loop; whoever looks cannot disturb it. Under client-level
privacy who took part is the server's secret (``clients.jsonl``): the value then has no
counts, no names of who was asked and no bytes, as ``metrics.csv`` has none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Literal

from fedtune.config import Config
from fedtune.errors import FedtuneError
from fedtune.privacy.words import plural, shown
from fedtune.server.run_folder import RunFolder
from fedtune.server.snapshot_budget import BudgetView, budgets_of
from fedtune.server.snapshot_read import Asked, Seen, Trouble

__all__ = [
    "BudgetView", "NodeView", "RunStatus", "Seen", "Snapshot", "Trouble", "as_json", "snapshot_of",
]  # fmt: skip

NodeStatus = Literal["online", "offline", "never", "revoked"]
RunStatus = Literal["waiting", "running", "finished", "failed", "stopped", "killed"]

_MOST_ROWS = 200
_NAME, _WORDS = 80, 300


@dataclass(frozen=True)
class NodeView:
    """One enrolled node.

    Attributes
    ----------
    name : str
    status : str
        ``never``: enrolled, and not heard of yet.
    last_seen : float or None
        Unix time.
    rounds_ok, failed, late : int or None
        Answers in rounds that count; ``snapshot_of`` fills them in. ``None`` where who took
        part is secret.
    note : str
        What was wrong with the last answer.
    """

    name: str
    status: NodeStatus
    last_seen: float | None = None
    rounds_ok: int | None = None
    failed: int | None = None
    late: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Snapshot:
    """How a federation stands at one moment.

    Attributes
    ----------
    federation, experiment, run : str
    status : str
        ``waiting``: for nodes, or for a run; ``killed``: nobody works on a run that has not
        ended.
    reason : str
        Why it failed or was stopped.
    round, rounds : int
        The last round that counts, and how many there will be.
    phase : str
        What happens now, in words.
    started : float or None
        Unix time.
    seconds_left : float or None
        From the last rounds' times; ``None`` when there is nothing to go by.
    nodes : tuple of NodeView
    rows : tuple of dict
        ``metrics.jsonl``; round 0 is the base model.
    budgets : tuple of BudgetView
    bytes_down, bytes_up : int or None
        Training messages so far; ``None`` where their number is secret.
    troubles : tuple of Trouble
        Newest first.
    queue : tuple of str
        Runs that wait.
    address : str
        Where nodes connect.
    certificate_days_left : int or None
    made : float
        Unix time of this value.
    secret : bool
        Who takes part is not shown.
    """

    federation: str
    experiment: str
    run: str
    status: RunStatus
    reason: str
    round: int
    rounds: int
    phase: str
    started: float | None
    seconds_left: float | None
    nodes: tuple[NodeView, ...]
    rows: tuple[Mapping[str, Any], ...]
    budgets: tuple[BudgetView, ...]
    bytes_down: int | None
    bytes_up: int | None
    troubles: tuple[Trouble, ...]
    queue: tuple[str, ...]
    address: str
    certificate_days_left: int | None
    made: float
    secret: bool


def snapshot_of(
    folder: RunFolder | None,
    nodes: Sequence[NodeView] = (),
    *,
    federation: str = "",
    address: str = "",
    certificate_days_left: int | None = None,
    queue: Sequence[str] = (),
    troubles: Sequence[Trouble] = (),
    seen: Seen | None = None,
    now: float | None = None,
) -> Snapshot:
    """Return how a run stands, by its folder.

    Parameters
    ----------
    folder : RunFolder or None
        ``None``: no run yet.
    nodes : sequence of NodeView
        Who is enrolled; counts are filled in from the folder.
    federation, address, certificate_days_left, queue
        What the server knows and the folder does not.
    troubles : sequence of Trouble
        The server's own: parts that died, nodes that were refused.
    seen : Seen or None
        Keep one, so that long files are read once.
    now : float or None
        Unix time; ``None``: the clock's.

    Raises
    ------
    FedtuneError
        The folder is no run folder.
    """
    now = time.time() if now is None else now
    bare = Snapshot(
        federation=shown(federation, _NAME), experiment="", run="", status="waiting", reason="",
        round=0, rounds=0, phase="no run yet", started=None, seconds_left=None,
        nodes=tuple(_clean(node) for node in nodes), rows=(), budgets=(), bytes_down=0, bytes_up=0,
        troubles=_newest(list(troubles)), queue=tuple(shown(name, _NAME) for name in queue),
        address=shown(address, _NAME), certificate_days_left=certificate_days_left, made=now,
        secret=False,
    )  # fmt: skip
    if folder is None:
        return bare
    seen = seen or Seen()
    with seen.lock:
        config = seen.look(folder)
        return _of_run(bare, folder, config, seen, list(troubles))


def as_json(snapshot: Snapshot) -> dict[str, Any]:
    """Return a value for JSON: the newest rows only, and null for what is not finite."""
    found: dict[str, Any] = _finite(asdict(snapshot))
    return found | {"rows": found["rows"][-_MOST_ROWS:], "rows_in_all": len(snapshot.rows)}


def _of_run(
    bare: Snapshot, folder: RunFolder, config: Config, seen: Seen, given: list[Trouble]
) -> Snapshot:
    facts = _facts(folder)
    secret = config.privacy.client is not None
    rounds, rows = config.federation.rounds, tuple(seen.rows)
    reached = int(rows[-1]["round"]) if rows else 0
    status = _status(folder, facts)
    if missing := _missing(bare, config, status, bool(rows)):
        status = "waiting"
    asked = seen.asked if _is_now(folder, seen.asked, reached) else None
    kept = [trouble for trouble, tells in seen.troubles if not (secret and tells)]
    sent = [_total(rows, f"bytes_{way}") for way in ("down", "up")]
    return replace(
        bare,
        experiment=config.name, run=shown(folder.path.name, _NAME), status=status,
        reason=shown(str(facts.get("reason", "")), _WORDS), round=reached, rounds=rounds,
        phase=missing or _phase(status, reached, rounds, asked, secret, bool(rows)),
        started=_unix(facts.get("started")),
        seconds_left=_left(rows, rounds, asked, bare.made) if status == "running" else None,
        nodes=tuple(node if secret else _counted(node, seen) for node in bare.nodes),
        rows=rows, budgets=budgets_of(folder, config, facts, rows, bare.made, seen.known),
        bytes_down=None if secret else sent[0], bytes_up=None if secret else sent[1],
        troubles=_newest([*kept, *given]), secret=secret,
    )  # fmt: skip


def _facts(folder: RunFolder) -> dict[str, Any]:
    try:
        return folder.status()
    except (OSError, ValueError) as error:
        raise FedtuneError(
            f"'{folder.path / 'run.json'}' cannot be read: {error}",
            hint="is it a run folder, and may this user read it?",
        ) from error


def _status(folder: RunFolder, facts: Mapping[str, Any]) -> RunStatus:
    known: dict[str, RunStatus] = {
        "finished": "finished", "failed": "failed", "stopped": "stopped",
    }  # fmt: skip
    if ended := known.get(str(facts.get("status"))):
        return ended
    if folder.is_alive():
        return "running"
    # A killed process could not write how it ended.
    return "waiting" if facts.get("status") == "starting" else "killed"


def _is_now(folder: RunFolder, asked: Asked | None, reached: int) -> bool:
    """Say whether an attempt belongs to the session that works on the run now."""
    if asked is None or asked.round <= reached or asked.ended:
        return False
    try:
        # Taking the lock is the first thing a session does, and sets the file's time.
        return asked.begun >= (folder.path / ".lock").stat().st_mtime - 0.05
    except OSError:
        return False


def _phase(
    status: RunStatus, reached: int, rounds: int, asked: Asked | None, secret: bool, begun: bool
) -> str:
    if status == "finished":
        return f"{plural(reached, 'round')} done"
    if status in ("failed", "stopped"):
        return f"after round {reached} of {rounds}"
    if status == "waiting":
        return "starting"
    if status == "killed":
        return f"nobody works on this run; round {reached} of {rounds} is safe"
    if reached >= rounds:
        return "saving the result"
    if not begun:
        return "asking nodes who they are, and measuring the base model"
    if asked is None:
        return f"about to begin round {reached + 1}"
    if secret:
        return f"round {asked.round} is under way"
    return f"round {asked.round}: {_progress(asked)}"


def _missing(bare: Snapshot, config: Config, status: RunStatus, begun: bool) -> str:
    """Say how many nodes a served run still waits for before its first round."""
    online = sum(node.status == "online" for node in bare.nodes)
    missing = config.federation.server.nodes - online
    if begun or status not in ("running", "waiting") or not bare.address or missing <= 0:
        return ""
    return f"waiting for {plural(missing, 'more node')}"


def _progress(asked: Asked) -> str:
    outcomes = list(asked.done.values())
    bad = len(outcomes) - outcomes.count("ok") - outcomes.count("late")
    late = outcomes.count("late")
    extra = (f", {bad} failed" if bad else "") + (f", {late} late" if late else "")
    if len(outcomes) >= asked.cohort:
        return f"all {plural(asked.cohort, 'node')} accounted for{extra}; adding up and measuring"
    return f"{outcomes.count('ok') + bad} of {asked.cohort} answered{extra}"


def _left(
    rows: Sequence[Mapping[str, Any]], rounds: int, asked: Asked | None, now: float
) -> float | None:
    recent = [row["seconds"] for row in rows[-5:] if row["round"] and row.get("seconds")]
    if not recent:
        return None
    each = sum(recent) / len(recent)
    gone = min(max(0.0, now - asked.begun), each) if asked else 0.0
    return float(max(0.0, each * (rounds - int(rows[-1]["round"])) - gone))


def _counted(node: NodeView, seen: Seen) -> NodeView:
    tally = seen.tallies.get(node.name)
    if tally is None:
        return replace(node, rounds_ok=0, failed=0, late=0)
    return replace(
        node, rounds_ok=tally.ok, failed=tally.failed, late=tally.late,
        note=node.note or tally.note,
    )  # fmt: skip


def _clean(node: NodeView) -> NodeView:
    return replace(node, name=shown(node.name, _NAME), note=shown(node.note, _WORDS))


def _newest(troubles: list[Trouble]) -> tuple[Trouble, ...]:
    # Of one millisecond, the later one is newer.
    order = sorted(enumerate(troubles), key=lambda pair: (pair[1].when or 0.0, pair[0]))
    return tuple(
        replace(one, who=shown(one.who, _NAME), words=shown(one.words, _WORDS))
        for _, one in order[::-1]
    )


def _total(rows: Sequence[Mapping[str, Any]], key: str) -> int:
    return sum(int(row.get(key) or 0) for row in rows)


def _unix(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value

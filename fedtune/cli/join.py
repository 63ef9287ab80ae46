"""``fedtune join``: one owner's node, from its start to its stop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli.out import Out, reporting
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import try_lock

if TYPE_CHECKING:
    from fedtune.cli.joining import NodeState
    from fedtune.client.fleet import Door, NodeEvent
    from fedtune.client.node import Node
    from fedtune.terms import Own

__all__ = ["door_of", "join"]

_TROUBLES = 5

Server = Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="The federation.")]
Key = Annotated[Path, typer.Option("--key", help="This node's key: fedtune keys node.")]
Authority = Annotated[Path, typer.Option("--ca", help="The federation's certificate, ca.pem.")]


def join(
    server: Server,
    key: Key,
    data: Annotated[Path, typer.Option("--data", help="The owner's text; it stays here.")],
    ca: Authority = Path("ca.pem"),
    policy: Annotated[
        Path | None, typer.Option("--policy", help="What the owner allows (TOML): docs/join.md.")
    ] = None,
    max_epsilon: Annotated[
        float | None, typer.Option("--max-epsilon", help="Over all runs on this text, for ever.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="The text's name in the owner's ledger.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder of the base model, if not embedded.")
    ] = None,
    home: Annotated[
        Path | None, typer.Option("--home", help="Ledger, log and state; default: NAME.node.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of torch.")] = 1,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")] = "cpu",
    body: Annotated[
        str, typer.Option("--body", metavar="HOST:PORT", help="Split tuning: the body's server.")
    ] = "",
    grace: Annotated[
        float, typer.Option("--grace", help="Seconds a round may still take after Ctrl-C.")
    ] = 60.0,
) -> None:  # fmt: skip
    """Join a federation with text that stays here, under the owner's own limits."""
    with reporting(Out("join", as_json=False)) as out:
        from fedtune.cli.joining import following_node
        from fedtune.client.fleet import serve_messages
        from fedtune.client.policy import read_policy
        from fedtune.keys.certificates import read_ca
        from fedtune.keys.node import read_identity
        from fedtune.terms import Own

        given = {"max_epsilon": max_epsilon, "dataset": dataset}
        rules = read_policy(policy, **given)
        if max_epsilon is not None:
            per_run = min(rules.max_epsilon_per_run, max_epsilon)
            rules = rules.model_copy(update={"max_epsilon_per_run": per_run})
        identity = read_identity(key)
        place = (home or key.with_name(f"{identity.name}.node")).resolve()
        own = Own(
            name=identity.name, source=str(data.resolve()), dataset=rules.dataset or data.stem,
            ledger=str(place / "ledger.db"), model=str(model.resolve()) if model else "",
            data=rules.data, threads=threads, device=device, body=body,
            body_root=str(ca.resolve()) if body else "",
            body_key=str(key.resolve()) if body else "",
        )  # fmt: skip
        door = replace(door_of(server, key, ca, rules.message_mb), memo=place / "seat.json")
        with _alone(place):
            own = replace(own, rows=_bound_of(_count_rows(own), rules.rows_at_most))
            view = _View(out, server, identity.name, rules.max_epsilon)
            from fedtune.client.node import Node

            node = Node(place, identity, read_ca(ca), rules, own, view.told)
            view.node = node
            stop = _stopper()
            with following_node(view.state, out.people):
                serve_messages(door, node.answer, view.heard, stop, grace=grace)
            out.say("left the federation; what was spent is in the ledger")


def door_of(server: str, key: Path, ca: Path, message_mb: int = 256) -> Door:
    """Return how to reach a federation; files are read now.

    Raises
    ------
    FedtuneError
        A file is missing, or not what it should be.
    """
    from fedtune.client.fleet import Door
    from fedtune.keys.certificates import read_ca
    from fedtune.keys.node import read_identity

    return Door(
        address=server, root=read_ca(ca), login=read_identity(key).login,
        most_bytes=message_mb << 20,
    )  # fmt: skip


class _View:
    """What the node does, for the terminal; heard from its own threads."""

    def __init__(self, out: Out, server: str, name: str, cap: float) -> None:
        from fedtune.cli.joining import NodeState

        self._out, self._lock = out, threading.Lock()
        self.node: Node | None = None
        self._state = NodeState(name, server, False, time.time(), cap=cap, doing="connecting")

    def state(self) -> NodeState:
        """Return what is to be shown now."""
        with self._lock:
            state = self._state
        node = self.node
        work = node.work() if node else None
        if node is None or work is None:
            return state
        spent = None
        with contextlib.suppress(FedtuneError):
            spent = node.spent()
        return replace(
            state, job=work.job, experiment=work.config.name,
            rounds=work.config.federation.rounds, epsilon=spent[0] if spent else None,
        )  # fmt: skip

    def told(self, words: str) -> None:
        """Hear words of the node."""
        trouble = words.startswith(("refused", "failed"))
        self._change(last=words, trouble=words if trouble else "")

    def heard(self, event: NodeEvent) -> None:
        """Hear an event of the connection."""
        changes: dict[str, Any] = {"last": event.words}
        state = self._state
        if event.kind == "connected":
            changes |= {"connected": True, "since": time.time(), "doing": "waiting for work"}
        elif event.kind == "lost":
            changes |= {"connected": False, "since": time.time(), "doing": "reconnecting"}
        elif event.kind == "asked":
            changes["received_bytes"] = state.received_bytes + event.bytes
            changes["doing"] = f"working on {event.about}"
            number = event.group.partition(".")[0]
            if number.isdecimal():
                changes["round"] = int(number)
        elif event.kind == "answered":
            changes["sent_bytes"] = state.sent_bytes + event.bytes
            changes["doing"] = "waiting for work"
        odd = event.kind in ("lost", "refused", "late", "dropped")
        self._change(trouble=event.words if odd else "", **changes)

    def _change(self, trouble: str = "", **changes: Any) -> None:
        with self._lock:
            troubles = (*self._state.troubles, trouble) if trouble else self._state.troubles
            self._state = replace(self._state, troubles=troubles[-_TROUBLES:], **changes)


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Keep a node's folder to one process: two would share one identity and one ledger."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.chmod(0o700)
    with (home / ".lock").open("w") as file:
        if not try_lock(file):
            raise FedtuneError(
                f"'{home}' is in use by another node process", hint="stop it, or choose --home",
                code=ExitCode.RUN_FOLDER,
            )  # fmt: skip
        yield


def _bound_of(rows: int, most: int) -> int:
    """Return what may be known of the number of rows: the owner's bound, or a power of two."""
    if most and rows > most:
        raise FedtuneError(
            f"the text has {rows} rows, more than rows_at_most={most}",
            hint="raise it in the policy, or give fewer rows", code=ExitCode.DATA,
        )  # fmt: skip
    return most or 1 << max(0, rows - 1).bit_length()


def _count_rows(own: Own) -> int:
    """Read the text before anybody is told of this node; return how many rows it has."""
    from fedtune.config import DataConfig
    from fedtune.data.read import read_table

    keys = ("format", "split", "separator", "pattern", "encoding")
    settings = {name: own.data[name] for name in keys if name in own.data}
    return len(read_table(DataConfig(source=own.source, **settings), own.source).rows)


def _stopper() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    return stop

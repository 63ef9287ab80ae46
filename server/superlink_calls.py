"""What the engine asks of its SuperLink, so that asking twice does no harm.

A SuperLink that dies while it answers may have done what it was asked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.proto.node_pb2 import NodeInfo

from fedtune.errors import FedtuneError
from fedtune.server.superlink_control import Control

__all__ = [
    "FINISHED", "GONE", "Node", "Status", "cut_off", "end_run", "enrol", "node_of", "take_task_of"
]  # fmt: skip

FINISHED = "finished"
GONE = "unregistered"
_TASK_SECONDS = 5.0

Status = Literal["registered", "online", "offline"]


@dataclass(frozen=True)
class Node:
    """One enrolled node.

    Attributes
    ----------
    name : str
        As enrolled.
    node_id : int
        Flower's.
    status : str
        ``registered``: never seen; ``online``: its heartbeats come; ``offline``.
    last_seen : float or None
        Seconds since 1970. It was there then; up to two heartbeats of silence passed before
        it counted as offline.
    """

    name: str
    node_id: int
    status: Status
    last_seen: float | None


def take_task_of(control: Control, run: int) -> str | None:
    """Take the task of a run that was just started, as ``flower-superexec`` would.

    Tasks of other runs have nobody who would work on them; those runs are stopped.

    Returns
    -------
    str or None
        The token that its ServerApp shows. None: taken before, by a call whose answer was
        lost; the run can only be stopped.
    """
    end = time.monotonic() + _TASK_SECONDS
    while time.monotonic() < end:
        task = control.take_task()
        if task is None:
            time.sleep(0.05)
        elif task[0] == run:
            return task[1]
        else:
            end_run(control, task[0])
    return None


def enrol(control: Control, name: str, key: bytes) -> None:
    """Let a node in by its public key (PEM), if it is not known."""
    if all(bytes(node.public_key) != key for node in control.nodes()):
        control.register(name, key)


def cut_off(control: Control, node: int) -> None:
    """Refuse a node from now on, if it is not refused already."""
    if any(one.node_id == node and one.status != GONE for one in control.nodes()):
        control.unregister(node)


def end_run(control: Control, run: int) -> None:
    """Stop a run, if it has not ended."""
    if control.run(run).status.status != FINISHED:
        # It may end by itself in between.
        try:
            control.stop(run)
        except FedtuneError:
            if control.run(run).status.status != FINISHED:
                raise


def node_of(node: NodeInfo, name: str | None) -> Node:
    """Return what is known of a node; ``name`` is the one on the roster, if it has another."""
    status: Status = "online" if node.status == "online" else "offline"
    seen: float | None = None
    if node.status == "registered":
        status = "registered"
    elif node.online_until:
        seen = node.online_until - HEARTBEAT_PATIENCE * node.heartbeat_interval
    return Node(name or node.name, node.node_id, status, seen)

"""What runs in the processes of the measurement ``node``: our ServerApp, and our nodes.

``python -m fedtune.simulations.benchmarks.node_apps FILE.json`` runs nodes, each with its
own key and channel, in threads of one process until its standard input ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedtune.server.link import GridLink
from fedtune.server.patient import Patient
from fedtune.wire import Task, Update, from_record, to_record

__all__ = ["app", "main", "reply_to", "task_of"]

_TTL = 600.0
app = ServerApp()


@app.main()
def serve(grid: Grid, context: Context) -> None:
    """Do the rounds that ``plan.json`` in the run's folder asks for; one line for each."""
    folder = Path(str(context.run_config["folder"]))
    plan = json.loads((folder / "plan.json").read_text())
    link = GridLink(Patient(grid))
    while len(nodes := link.nodes()) < plan["nodes"]:
        time.sleep(0.1)
    with (folder / "rounds.jsonl").open("a") as out:
        for size, rounds in plan["steps"]:
            for number in range(rounds):
                task = task_of(size, number)
                began = time.perf_counter()
                heard = list(link.ask(Update, nodes, task, _TTL)[1])
                seconds = time.perf_counter() - began
                good = sum(_right(answer.value, task, answer.node) for answer in heard)
                line = {"bytes": size, "seconds": seconds, "good": good}
                out.write(json.dumps(line) + "\n")
                out.flush()
                del task, heard


def task_of(size: int, number: int) -> Task:
    """Return a task with a tensor of ``size`` bytes (0: none)."""
    values = np.random.default_rng(number).random(size // 4, np.float32)
    return Task(number, 1, 0, 0.0, {"x": values} if size else {})


def reply_to(message: Message) -> Message:
    """Return as many bytes as came, all of them changed, in a way that differs by node."""
    task, add = from_record(Task, message.content), _added(message.metadata.dst_node_id)
    tensors = {name: value + add for name, value in task.tensors.items()}
    update = Update(task.round, task.attempt, 1, 0, 0, 0.0, tensors)
    return Message(to_record(update), reply_to=message)


def _right(update: Update | None, task: Task, node: int) -> bool:
    if update is None or update.round != task.round or update.tensors.keys() != task.tensors.keys():
        return False
    pairs = ((update.tensors[name], value + _added(node)) for name, value in task.tensors.items())
    return all(np.array_equal(came, due) for came, due in pairs)


def _added(node: int) -> np.float32:
    return np.float32(node % 255 + 1)


def main() -> None:
    """Run nodes until standard input ends."""
    from fedtune.client.fleet import Door, NodeEvent, serve_messages

    order: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    root, stop = Path(order["root"]).read_bytes(), threading.Event()

    def watch(event: NodeEvent) -> None:
        if event.kind not in {"connected", "asked", "answered"}:
            sys.stderr.write(f"{event.kind}: {event.words}\n")

    def run(pem: str) -> None:
        login: Any = load_pem_private_key(pem.encode(), None)
        serve_messages(Door(order["address"], root, login), reply_to, watch, stop)

    threads = [threading.Thread(target=run, args=(pem,)) for pem in order["keys"]]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join(20)
    os._exit(0)


if __name__ == "__main__":
    main()

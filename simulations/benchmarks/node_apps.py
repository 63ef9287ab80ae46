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
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedtune.server.fast_grid import hasten, pauses

__all__ = ["app", "main", "payload", "reply_to"]

_TTL = 600.0
app = ServerApp()


@app.main()
def serve(grid: Grid, context: Context) -> None:
    """Do the rounds that ``plan.json`` in the run's folder asks for; one line for each."""
    folder = Path(str(context.run_config["folder"]))
    plan = json.loads((folder / "plan.json").read_text())
    hasten()
    while len(nodes := list(grid.get_node_ids())) < plan["nodes"]:
        time.sleep(0.1)
    with (folder / "rounds.jsonl").open("a") as out:
        for size, rounds in plan["steps"]:
            for number in range(rounds):
                content, first = payload(size, number)
                began = time.perf_counter()
                heard = _exchange(grid, nodes, content)
                seconds = time.perf_counter() - began
                good = sum(_right(reply, size, first) for reply in heard)
                line = {"bytes": size, "seconds": seconds, "good": good}
                out.write(json.dumps(line) + "\n")
                out.flush()
                del content, heard


def payload(size: int, number: int) -> tuple[RecordDict, int]:
    """Return a message's content with an array of ``size`` bytes (0: none), and its first byte."""
    fields = ConfigRecord({"round": number})
    if not size:
        return RecordDict({"fields": fields}), number
    data = np.random.default_rng(number).bytes(size)
    arrays = ArrayRecord({"x": Array("uint8", (size,), "bytes", data)})
    return RecordDict({"fields": fields, "arrays": arrays}), data[0]


def reply_to(message: Message) -> Message:
    """Return as many bytes as came, all of them changed, in a way that differs by node."""
    record = message.content
    answer = RecordDict({"fields": record["fields"]})
    if "arrays" in record:
        add = np.uint8(message.metadata.dst_node_id % 255 + 1)
        data = np.frombuffer(record.array_records["arrays"]["x"].data, np.uint8) + add
        answer["arrays"] = ArrayRecord({"x": Array("uint8", data.shape, "bytes", data.tobytes())})
    return Message(answer, reply_to=message)


def _exchange(grid: Grid, nodes: list[int], content: RecordDict) -> list[Message]:
    messages = [Message(content, node, "train", ttl=_TTL) for node in nodes]
    waiting = set(grid.push_messages(messages))
    heard: list[Message] = []
    pause, deadline = pauses(), time.monotonic() + _TTL
    while waiting and time.monotonic() < deadline:
        replies = list(grid.pull_messages(waiting))
        waiting -= {reply.metadata.reply_to_message_id for reply in replies}
        heard += replies
        if replies:
            pause = pauses()
        else:
            time.sleep(next(pause))
    return heard


def _right(reply: Message, size: int, first: int) -> bool:
    if reply.has_error():
        return False
    if not size:
        return reply.content.config_records["fields"]["round"] == first
    data = reply.content.array_records["arrays"]["x"].data
    return len(data) == size and data[0] == (first + reply.metadata.src_node_id % 255 + 1) % 256


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

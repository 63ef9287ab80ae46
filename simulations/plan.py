"""What an experiment will do and cost, before it does it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedtune.adapters import averaging, trainable
from fedtune.client.backprop import steps_of
from fedtune.config import Config
from fedtune.data import encode, load
from fedtune.models import context_length, settings_of
from fedtune.privacy.events import Unit
from fedtune.privacy.forecast import forecast
from fedtune.privacy.forecast import lines as private_lines
from fedtune.privacy.plan import promises, resolve
from fedtune.server.rounds import Member, cohort_of
from fedtune.server.tuned import Tuned, load_tuned
from fedtune.wire import Task, Update, size_of, to_record

__all__ = ["describe", "plan"]


def plan(config: Config) -> dict[str, Any]:
    """Load data and model, train nothing, and predict the run.

    Returns
    -------
    dict
        Clients, steps, parameters, bytes per round (measured on encoded
        messages of the right shapes), and memory of one client in MB.
    """
    config = resolve(config)
    federation = load(config.data, config.seed)
    tuned = load_tuned(config, federation.labels)
    encoded = {
        shard.name: encode(shard.train, tuned.base.tokenizer, config.data, federation.labels)
        for shard in federation.shards
    }
    examples = {name: len(one.ids) for name, one in encoded.items()}
    members = tuple(
        Member(name, i + 1, len(shard.train))
        for i, (name, shard) in enumerate(zip(examples, federation.shards, strict=True))
    )
    rounds = config.federation.rounds
    cohorts = [cohort_of(members, config, n, 0) for n in range(1, rounds + 1)]
    promised = promises(config)
    fixed = next((p.releases for p in promised if p.unit is Unit.EXAMPLE), 0)
    steps = sum(
        fixed or steps_of(examples[m.client], config.tuning) for one in cohorts for m in one
        if fixed or examples[m.client]
    )  # fmt: skip
    trained = sum(p.numel() for p in trainable(tuned.model).values())
    down, up = _bytes(tuned)
    size = len(cohorts[0])
    return {
        "name": config.name,
        "base": config.model.base,
        "clients": len(members),
        "clients_without_examples": sorted(name for name, n in examples.items() if not n),
        "examples": sum(examples.values()),
        "examples_per_client": _spread(list(examples.values())),
        "truncated": sum(one.truncated for one in encoded.values()),
        "adapter": config.tuning.adapter,
        "averaging": averaging(config.tuning.adapter),
        "parameters": sum(p.numel() for p in tuned.model.parameters()),
        "parameters_trained": trained,
        "context": context_length(tuned.base),
        "rounds": rounds,
        "cohort": size,
        "steps": steps,
        "bytes_down_per_client": down,
        "bytes_up_per_client": up,
        "bytes_per_round": size * (down + up),
        "bytes": sum(len(one) for one in cohorts) * (down + up),
        "client_memory_mb": _memory_mb(config, tuned),
        "privacy": [
            forecast(one, trained, size if one.unit is Unit.EXAMPLE else 1) for one in promised
        ],
        "notes": [*federation.notes, *_warnings(config)],
    }


def describe(made: Mapping[str, Any]) -> str:
    """Return a plan as lines for people."""
    smallest, median, largest = made["examples_per_client"]
    lines = [
        f"{made['name']}: {made['base']}, adapter {made['adapter']} "
        f"({made['averaging']} averaging)",
        f"  trained      {made['parameters_trained']:,} of {made['parameters']:,} parameters",
        f"  clients      {made['clients']}, {made['cohort']} each round, {made['rounds']} rounds",
        f"  examples     {made['examples']:,} (per client {smallest:,} to {largest:,}, "
        f"median {median:,})",
        f"  steps        {made['steps']:,} of the optimiser, all clients and rounds",
        f"  bytes        {made['bytes_per_round']:,} per round "
        f"({made['bytes_down_per_client']:,} down and {made['bytes_up_per_client']:,} up "
        f"per client), {made['bytes']:,} in all",
        f"  memory       about {made['client_memory_mb']:,} MB for one client's model and training",
    ]
    for one in made["privacy"]:
        lines += private_lines(one)
    if made["truncated"]:
        lines.append(f"  truncated    {made['truncated']:,} examples are longer than max_length")
    lines += [f"  no examples  {name}" for name in made["clients_without_examples"]]
    lines += [f"  note         {note}" for note in made["notes"]]
    return "\n".join(lines)


def _bytes(tuned: Tuned) -> tuple[int, int]:
    """Return the encoded size of a task and of an update, in the run's own shapes."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    state = tuned.start()
    rng = np.random.default_rng(0)
    noise = {n: rng.random(v.shape, dtype=np.float32) for n, v in state.adapter.items()}
    task = Task(1, 0, 0, tuned.config.tuning.lr, noise)
    update = Update(1, 0, 100, 10, 0, 1.0, noise)
    down = Message(to_record(task), 1, "train", group_id="1.0")
    down.metadata.__dict__["_message_id"] = "1"
    return size_of(down), size_of(Message(to_record(update), reply_to=down))


def _memory_mb(config: Config, tuned: Tuned) -> int:
    """Estimate weights, optimiser, and the activations that backpropagation keeps.

    Per token and layer a transformer keeps about 34 hidden states in 16 bit
    (Korthikanti et al. 2022, eq. 1 without attention maps), as float32 here,
    and the logits and their gradient.
    """
    shape = settings_of(tuned.base.model)
    weights = sum(p.numel() for p in tuned.base.model.parameters())
    trained = sum(p.numel() for p in trainable(tuned.model).values())
    tokens = config.tuning.batch_size * config.data.max_length
    layers = int(getattr(shape, "num_hidden_layers", 1))
    kept = tokens * layers * 34 * int(shape.hidden_size)
    logits = 3 * tokens * int(shape.vocab_size) if config.model.task == "causal-lm" else 0
    return math.ceil(4 * (weights + 4 * trained + kept / 2 + logits) / 2**20)


def _spread(values: list[int]) -> tuple[int, int, int]:
    return min(values), int(np.median(values)), max(values)


def _warnings(config: Config) -> list[str]:
    found = []
    kind = averaging(config.tuning.adapter)
    if kind == "product" and config.federation.aggregation == "mean":
        found.append("averaging LoRA factors is inexact; the error is logged each round")
    if kind == "inexact":
        found.append(f"averaging '{config.tuning.adapter}' is inexact and has no exact rule here")
    if config.federation.aggregation == "fedex":
        found.append("fedex: the residual adds to what goes down, up to its rank")
    return found

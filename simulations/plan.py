"""What an experiment will do and cost, before it does it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedtune.adapters import Tensors, averaging, trainable
from fedtune.client.backprop import LocalRun, steps_of
from fedtune.client.seeded import Local, upload
from fedtune.config import Config
from fedtune.data import encode, load
from fedtune.models import context_length, settings_of
from fedtune.pool.agree import key_of_seed
from fedtune.pool.codec import COEFFICIENTS
from fedtune.pool.groups import projected, released
from fedtune.privacy.events import Unit
from fedtune.privacy.forecast import forecast
from fedtune.privacy.forecast import lines as private_lines
from fedtune.privacy.plan import promises, resolve
from fedtune.privacy.schedule import schedule_of
from fedtune.server.asking import Member
from fedtune.server.disclose import sizes_of
from fedtune.server.members import cohort_of
from fedtune.server.seeded import advance, begin, tensors_for
from fedtune.server.tuned import Tuned, load_tuned
from fedtune.simulations.plan_split import split_lines, split_plan
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
    cut = {}
    if config.tuning.cut:
        tokens = [sum(map(len, one.ids)) for one in encoded.values()]
        length = sum(tokens) / max(1, sum(examples.values()))
        cut = {"split": split_plan(config, tuned, int(np.median(tokens)), max(1, round(length)))}
    return {
        "name": config.name,
        "base": config.model.base,
        "clients": len(members),
        "clients_without_examples": sorted(name for name, n in examples.items() if not n),
        "examples": sum(examples.values()),
        "examples_per_client": _spread(list(examples.values())),
        "truncated": sum(one.truncated for one in encoded.values()),
        "adapter": config.tuning.adapter,
        "method": config.tuning.method,
        "averaging": "linear" if config.tuning.seeded else averaging(config.tuning.adapter),
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
            forecast(
                one,
                released(config, trained, one.unit),
                size if one.unit is Unit.EXAMPLE else 1,
                schedule_of(config, one),
                sizes_of(tuned, one),
            )
            for one in promised
        ],
        "notes": [*federation.notes, *_warnings(config)],
    } | cut


def describe(made: Mapping[str, Any]) -> str:
    """Return a plan as lines for people."""
    smallest, median, largest = made["examples_per_client"]
    lines = [
        f"{made['name']}: {made['base']}, {made['method']}, adapter {made['adapter']} "
        f"({made['averaging']} averaging)",
        f"  trained      {made['parameters_trained']:,} of {made['parameters']:,} parameters",
        f"  clients      {made['clients']}, {made['cohort']} each round, {made['rounds']} rounds",
        f"  examples     {made['examples']:,} (per client {smallest:,} to {largest:,}, "
        f"median {median:,})",
        f"  steps        {made['steps']:,} of the optimiser, all clients and rounds",
        f"  bytes        {made['bytes_per_round']:,} per round "
        f"({made['bytes_down_per_client']:,} down and {made['bytes_up_per_client']:,} up "
        f"per client), {made['bytes']:,} in all"
        + ("; besides, what crosses the cut (below)" if "split" in made else ""),
    ]
    if "split" not in made:
        lines.append(f"  memory       about {made['client_memory_mb']:,} MB for one client's model "
                     "and training")  # fmt: skip
    for one in made["privacy"]:
        lines += private_lines(one)
    if "split" in made:
        lines += split_lines(made["split"])
    if made["truncated"]:
        lines.append(f"  truncated    {made['truncated']:,} examples are longer than max_length")
    lines += [f"  no examples  {name}" for name in made["clients_without_examples"]]
    lines += [f"  note         {note}" for note in made["notes"]]
    return "\n".join(lines)


def _bytes(tuned: Tuned) -> tuple[int, int]:
    """Return the encoded size of a task and of an update, in the run's own shapes."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    rng = np.random.default_rng(0)
    if tuned.weights is not None:
        given, taken = _coefficients(tuned, rng)
    else:
        state = tuned.start()
        given = {n: rng.random(v.shape, dtype=np.float32) for n, v in state.adapter.items()}
        taken = given
    task = Task(1, 0, 0, tuned.config.tuning.lr, given)
    update = Update(1, 0, 100, 10, 0, 1.0, taken)
    down = Message(to_record(task), 1, "train", group_id="1.0")
    down.metadata.__dict__["_message_id"] = "1"
    return size_of(down), size_of(Message(to_record(update), reply_to=down))


def _coefficients(tuned: Tuned, rng: np.random.Generator) -> tuple[Tensors, Tensors]:
    """Return what goes down and up where coefficients travel, with as many as may be."""
    config, weights = tuned.config, tuned.weights
    pool = config.tuning.pool
    state = begin(config, tuned.fingerprint, key_of_seed(config.seed))
    whole = rng.random(pool.size, dtype=np.float32)
    state = advance(config, state, replace(state, adapter={COEFFICIENTS: whole}))
    used = np.arange(pool.size)
    if tuned.groups is not None:
        used = tuned.groups.columns(0, 1)
    elif config.tuning.method == "seedpool":
        used = used[: pool.directions or pool.size]
    tuning = config.tuning
    if tuning.steps and not projected(tuning, _parameters(tuned), _device(tuned)):
        used = used[: tuning.steps * tuning.probe.count]
    sent = np.zeros(pool.size, np.float32)
    sent[used] = whole[used]
    local = Local(sent, LocalRun(0, 0.0), sent.astype(np.float16), used.astype(np.uint16))
    history = config.tuning.method == "fedkseed-pro" and not config.privacy.on
    given = tensors_for(config, weights, state, [0])[0] if weights else {}
    return given, upload(local, pool.bits, rng, history=history)


def _memory_mb(config: Config, tuned: Tuned) -> int:
    """Estimate weights, optimiser, and the activations that backpropagation keeps.

    Forward passes alone keep one layer's. Per token and layer a transformer keeps about 34
    hidden states in 16 bit
    (Korthikanti et al. 2022, eq. 1 without attention maps), as float32 here,
    and the logits and their gradient.
    """
    shape = settings_of(tuned.base.model)
    weights = _parameters(tuned)
    trained = sum(p.numel() for p in trainable(tuned.model).values())
    tokens = config.tuning.batch_size * config.data.max_length
    layers = int(getattr(shape, "num_hidden_layers", 1))
    kept = tokens * layers * 34 * int(shape.hidden_size)
    tuning = config.tuning
    forward_only = not tuning.by_gradient and not projected(tuning, weights, _device(tuned))
    if forward_only:
        kept = tokens * 34 * int(shape.hidden_size)
    logits = (
        (1 if forward_only else 3) * tokens * int(shape.vocab_size)
        if config.model.task == "causal-lm"
        else 0
    )
    # The optimiser's state and gradients; with a pool, the copy that weights are rebuilt from.
    states = 4 if tuning.by_gradient else 1
    return math.ceil(4 * (weights + states * trained + kept / 2 + logits) / 2**20)


def _parameters(tuned: Tuned) -> int:
    return sum(p.numel() for p in tuned.base.model.parameters())


def _device(tuned: Tuned) -> torch.device:
    return next(tuned.model.parameters()).device


def _spread(values: list[int]) -> tuple[int, int, int]:
    return min(values), int(np.median(values)), max(values)


def _warnings(config: Config) -> list[str]:
    found: list[str] = _asked(config)
    if config.tuning.cut:
        found.append("the server of the body can read the text that crosses the cut: fedtune audit "
                     "FILE --attack inversion")  # fmt: skip
    if config.tuning.cut and config.tuning.split.noise:
        found.append("tuning.split.noise costs quality, and no bound is claimed for it")
    if config.tuning.seeded:
        return found
    kind = averaging(config.tuning.adapter)
    if kind == "product" and config.federation.aggregation == "mean":
        found.append("averaging LoRA factors is inexact; the error is logged each round")
    if kind == "inexact":
        found.append(f"averaging '{config.tuning.adapter}' is inexact and has no exact rule here")
    if config.federation.aggregation == "fedex":
        found.append("fedex: the residual adds to what goes down, up to its rank")
    return found


def _asked(config: Config) -> list[str]:
    """Say how a language model is asked for a class, or that it is not where it should be."""
    if config.model.pooling == "prompt":
        return [f"classes are words after the template {config.data.template!r}: no new head"]
    if config.model.task == "classification" and not config.tuning.by_gradient:
        return [
            f"'{config.tuning.method}' starts from a new head here; methods without gradients "
            "rely on model.pooling='prompt' with a causal language model"
        ]
    return []

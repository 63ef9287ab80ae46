"""What a cut model costs a client, beside the other ways to tune it: part of the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from fedtune.adapters import trainable
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.server.tuned import Tuned
from fedtune.split.blocks import Cut, Stand, blocks_of, cut_of
from fedtune.split.economics import Shape, Work, advice, break_even_tokens, costs

__all__ = ["shape_of", "split_lines", "split_plan"]

_NAMES = {
    "full": "all weights, whole model",
    "lora": "LoRA, whole model",
    "prompts": "prompts, whole model",
    "seeds": "seeds, whole model",
    "split each": "split, sent each step",
    "split once": "split, sent once a run",
}


def split_plan(config: Config, tuned: Tuned, tokens: int, length: int) -> dict[str, Any]:
    """Compare ways to tune this model for one client and round.

    Parameters
    ----------
    config : Config
        With ``tuning.method = "sfprompt"``.
    tuned : Tuned
        Has the whole base model.
    tokens : int
        Of a client's training data, without virtual tokens.
    length : int
        Tokens of an example.

    Returns
    -------
    dict
        ``methods``: one mapping for each way, with bytes, FLOPs, memory in bytes, seconds;
        ``break_even_tokens``; ``advice``; ``shape``; ``tokens``.
    """
    tuning, split = config.tuning, config.tuning.split
    base = tuned.base.model
    cut = cut_of(base, split.head, split.tail)
    trained = {name: p.numel() for name, p in trainable(tuned.model).items()}
    prompts = tuning.adapter in ("sfprompt", "prompt")
    shape = shape_of(
        base, cut, rank=tuning.rank, trained=sum(trained.values()),
        before=prompts or split.adapt == "ends" or tuning.adapter in ("prefix", "p-tuning-v2"),
        words=config.model.task == "causal-lm",
    )  # fmt: skip
    epochs = tuning.epochs
    if tuning.steps and tokens:
        epochs = tuning.steps * tuning.batch_size * tuning.accumulate * length / tokens / split.keep
    rounds = max(1, round(config.federation.rounds * _often(config)))
    work = Work(
        tokens=tokens, length=length, batch=tuning.batch_size, epochs=epochs,
        local_epochs=split.local_epochs, keep=split.keep, prompt=tuning.tokens if prompts else 0,
        codec=split.codec, rank=split.rank, rounds=rounds, pool=tuning.pool.size,
    )  # fmt: skip
    moved = split.adapt == "ends" or (shape.before and (split.head or not prompts))
    found = tuple(
        cost for cost in costs(shape, work, split.bandwidth_mbit)
        if not (cost.method == "split once" and moved)  # hidden states do not stay as they are
    )  # fmt: skip
    return {
        "methods": [asdict(cost) for cost in found],
        "chosen": f"split {split.release}",
        "break_even_tokens": break_even_tokens(shape.lora, shape.width),
        "advice": list(advice(shape, work, found, split.memory_mb * 1e6, split.release)),
        "shape": asdict(shape),
        "tokens": tokens,
        "length": length,
        "memory_mb": split.memory_mb,
        "bandwidth_mbit": split.bandwidth_mbit,
    }


def split_lines(made: Mapping[str, Any]) -> list[str]:
    """Return what ``split_plan`` found as lines for people."""
    known = bool(made["bandwidth_mbit"])
    head = f"{'MB':>12} {'s' if known else '':>9} {'GFLOP':>11} {'memory MB':>10}"
    lines = [
        f"  split        one client, one round, {made['tokens']:,} tokens in examples of "
        f"{made['length']:,}:",
        f"    {'':26}{head}",
    ]
    for one in made["methods"]:
        seconds = f"{one['seconds']:,.1f}" if known else ""
        mark = " *" if one["method"] == made["chosen"] else ""
        lines.append(
            f"    {_NAMES[one['method']]:26}{one['bytes'] / 1e6:12,.2f} {seconds:>9} "
            f"{one['flops'] / 1e9:11,.1f} {one['memory'] / 1e6:10,.0f}{mark}"
        )
    if not known:
        lines.append("    seconds: set tuning.split.bandwidth_mbit to a client's link")
    lines += [f"  verdict      {text}" for text in made["advice"]]
    return lines


def shape_of(
    model: nn.Module, cut: Cut, *, rank: int, trained: int, before: bool, words: bool
) -> Shape:
    """Return a whole base model and its cut in numbers.

    Parameters
    ----------
    model : nn.Module
        Whole, without an adapter; the meta device is enough.
    cut : Cut
    rank : int
        Of LoRA on every linear layer, for the comparison.
    trained : int
        Parameters that split tuning trains.
    before : bool
        Some of them stand before the cut.
    words : bool
        Every position is given a value per word of the vocabulary.

    Raises
    ------
    FedtuneError
        The model is only a part.
    """
    blocks = blocks_of(model)
    if any(isinstance(block, Stand) for block in blocks.modules):
        raise FedtuneError(
            f"{type(model).__name__} is a part of a model: the plan needs the whole",
            hint="plan on a machine that can load the model",
            code=ExitCode.MODEL,
        )
    total = sum(p.numel() for p in model.parameters())
    body = sum(p.numel() for index in cut.body for p in blocks.modules[index].parameters())
    output = _output(model)
    tables = {
        id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)
    }
    tied = output is not None and id(output) in tables
    looked_up = sum(tables.values()) - (tables[id(output)] if tied and words else 0)
    if not words and output is not None and not tied:
        looked_up += output.numel()  # a few of its rows are asked for, if any
    return Shape(
        total=total, client=total - body, looked_up=looked_up,
        output=output.numel() if words and output is not None else 0,
        width=blocks.width, blocks=cut.count, client_blocks=cut.count - len(cut.body),
        lora=_lora(blocks.modules, rank), trained=trained, before=before,
    )  # fmt: skip


def _output(model: nn.Module) -> nn.Parameter | None:
    for one in model.modules():
        layer = getattr(one, "get_output_embeddings", lambda: None)()
        if isinstance(weight := getattr(layer, "weight", None), nn.Parameter):
            return weight
    return None


def _lora(blocks: nn.ModuleList, rank: int) -> int:
    """Return the parameters of LoRA on every linear layer, whichever way its matrix lies."""
    from transformers.pytorch_utils import Conv1D

    return sum(
        rank * sum(module.weight.shape)
        for module in blocks.modules() if isinstance(module, nn.Linear | Conv1D)
    )  # fmt: skip


def _often(config: Config) -> float:
    """Return how large a share of the rounds one client is asked in, on average."""
    cohort, clients = config.federation.cohort, config.data.partition.clients
    if cohort <= 1 or not clients:
        return min(float(cohort), 1.0)
    return min(1.0, cohort / clients)

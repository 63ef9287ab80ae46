"""Peak memory of a client that loads head and tail alone, against loading the whole model.

A Llama with random weights is written to disk; its embeddings, first and last block are a tenth
of it. A fresh process for each variant loads its part through ``fedtune.models.load_base``, as
a client does. ``ends, a step`` then makes one step of SFPrompt's first phase (prompts and LoRA
on the tail, AdamW) as well. Run it with::

    python -m fedtune.simulations.benchmarks.split_memory [--quick]

What is counted is the high-water mark of the resident set above what the process has with all
libraries loaded and a tiny model loaded and stepped; pages of files that are mapped count.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

__all__ = ["Peak", "Size", "main", "measure"]

VARIANTS = ("whole", "ends", "whole, a step", "ends, a step")
BAR = 0.25


@dataclass(frozen=True)
class Size:
    """Shape of the model; as it stands 308 M parameters, of which 31 M are the client's."""

    blocks: int = 24
    width: int = 1024
    inner: int = 2752
    vocabulary: int = 5488
    rows: int = 4
    length: int = 128
    head: int = 1
    tail: int = 1


QUICK = Size(width=512, inner=1376, vocabulary=2744)


@dataclass(frozen=True)
class Peak:
    """Of one variant, in MB.

    Attributes
    ----------
    before : float
        Resident with libraries and a tiny model.
    above : float
        High-water mark, less ``before``.
    parameters : int
        That were loaded.
    """

    before: float
    above: float
    parameters: int


def write(size: Size, folder: Path) -> int:
    """Write the checkpoint and a tokenizer; return how many parameters there are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedtune.models import model_folder

    for file in Path(model_folder("fedtune:tiny")).glob("*token*"):
        shutil.copy(file, folder)
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.inner,
        num_hidden_layers=size.blocks, num_attention_heads=size.width // 64,
        num_key_value_heads=size.width // 64, max_position_embeddings=2 * size.length,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(settings)
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(p.numel() for p in model.parameters())


def measure(variant: str, size: Size, folder: str) -> Peak:
    """Load one variant in this process and return its peak; meant for a fresh process."""
    torch.set_num_threads(1)
    _run(variant, replace(size, rows=1, length=8), "fedtune:tiny")
    gc.collect()
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        sys.stderr.write("the peak includes the start\n")
    parameters = _run(variant, size, folder)
    return Peak(before, _status("VmHWM") - before, parameters)


def _run(variant: str, size: Size, folder: str) -> int:
    from fedtune.client.remote import ends
    from fedtune.config import ModelConfig
    from fedtune.models import load_base

    settings = ModelConfig(base=folder)
    part = ends(size.head, size.tail) if variant.startswith("ends") else None
    base = load_base(settings, part=part)
    for parameter in base.model.parameters():
        parameter.sum().item()
    if variant.endswith("step"):
        _step(base, size)
    return sum(p.numel() for p in base.model.parameters())


def _step(base: Any, size: Size) -> None:
    """Make one step; ends without a body join head and tail, as the first phase does."""
    from fedtune.adapters import attach
    from fedtune.client.backprop import optimizer
    from fedtune.client.remote import remote_of
    from fedtune.client.split import bypassed
    from fedtune.config import TuningConfig
    from fedtune.measure import forward_loss

    split = {"head": size.head, "tail": size.tail}
    tuning = TuningConfig.model_validate(
        {"method": "sfprompt", "adapter": "sfprompt", "split": split}
    )
    model = attach(base, tuning, "causal-lm", 0)
    optim = optimizer(model, tuning, tuning.lr)
    ids = torch.randint(3, 2000, (size.rows, size.length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with bypassed(model) if remote_of(model) else contextlib.nullcontext():
        loss: torch.Tensor = forward_loss(model, batch, "causal-lm")[0].mean()
        loss.backward()  # type: ignore[no-untyped-call]
    optim.step()


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its table and its JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="77 M parameters: within a minute")
    size = QUICK if parser.parse_args(arguments).quick else Size()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as room:
        total = write(size, Path(room))
        gc.collect()
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            peaks = {v: pool.submit(measure, v, size, room).result() for v in VARIANTS}
    whole = peaks["whole"]
    table = Table(
        title=f"{total / 1e6:.0f} M parameters in float32, {size.blocks} blocks, "
        f"{size.head} + {size.tail} and the embeddings at the client"
    )
    for name in ("loaded", "parameters", "MB before", "peak MB above", "of whole"):
        table.add_column(name, justify="left" if name == "loaded" else "right")
    for variant, peak in peaks.items():
        table.add_row(variant, f"{peak.parameters:,}", f"{peak.before:,.0f}", f"{peak.above:,.0f}",
                      f"{peak.above / whole.above:.3f}")  # fmt: skip
    Console().print(table)
    client, step = peaks["ends"], peaks["ends, a step"]
    print(
        json.dumps(
            {
                "client_over_whole": client.above / whole.above,
                "client_step_over_whole_step": step.above / peaks["whole, a step"].above,
                "client_step_over_whole": step.above / whole.above,
                "bar": BAR,
                "parameters_over_client": total / client.parameters,
                "parameters": total,
                "peaks_mb": {variant: asdict(peak) for variant, peak in peaks.items()},
            }
        )
    )


if __name__ == "__main__":
    main()

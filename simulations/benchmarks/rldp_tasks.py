"""Tasks of the RLDP benchmark: one pooled data set each, small enough for thousands of runs.

Texts are cut short, and of two models only the last blocks are tuned: what comes before
them is frozen, so its hidden states are computed once, kept in 16 bits in the output
folder, and looked up. A step then costs the last blocks alone, for every policy alike.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.adapters import Task
from fedtune.config import DataConfig, ModelConfig, TuningConfig
from fedtune.data import Encoded, encode
from fedtune.data.row import Row
from fedtune.errors import ExitCode, FedtuneError
from fedtune.models import Base, load_base, settings_of, share

__all__ = ["TASKS", "Loaded", "Spec", "load_task", "shared", "specs"]


@dataclass(frozen=True)
class Spec:
    """A task, before anything is read.

    Attributes
    ----------
    name : str
    model : ModelConfig
    rows : callable
        Returns the rows for training, choosing the learning rate, the result, and public
        use: four lists, no row in two.
    length : int
        Tokens that an example is cut to.
    targets : tuple of str
        Layers that LoRA adapts.
    blocks : int
        Last blocks that are adapted; 0: all.
    batch : int
        m: expected examples in a step.
    micro : int
        Examples in one pass: of like length, so that little is padding.
    steps : int
        T.
    lrs, norms : tuple of float
        Learning rates that every policy chooses from, and clip norms that the fixed ones do.
    task : {"causal-lm", "classification"}
    choosers : int
        Seeds that they are chosen with: more where one says little.
    delta : float
    """

    name: str
    model: ModelConfig
    rows: Callable[[], tuple[list[Row], list[Row], list[Row], list[Row]]]
    length: int
    targets: tuple[str, ...]
    blocks: int
    batch: int
    micro: int
    steps: int
    lrs: tuple[float, ...]
    norms: tuple[float, ...] = (1.0, 3.0, 8.0, 20.0)
    task: Task = "causal-lm"
    choosers: int = 1
    delta: float = 1e-5

    def tuning(self, adapter: str, lr: float) -> TuningConfig:
        """Return what is tuned, and how."""
        return TuningConfig(
            adapter=adapter, rank=4, targets=self.targets, lr=lr, batch_size=self.micro
        )


@dataclass(frozen=True)
class Loaded:
    """A task with its model and texts.

    Attributes
    ----------
    spec : Spec
    base : Base
        Tuned as it is: with ``spec.blocks`` it is the last blocks over stored states.
    train, valid, test, public : Encoded
    folder : Path
        Where what takes long to find is kept.
    """

    spec: Spec
    base: Base
    train: Encoded
    valid: Encoded
    test: Encoded
    public: Encoded
    folder: Path


def shared() -> Path:
    """Return the folder of data and models that are not in the package.

    Raises
    ------
    FedtuneError
        ``FEDTUNE_SHARED`` names none.
    """
    place = Path(os.environ.get("FEDTUNE_SHARED", "../shared"))
    if not (place / "data").is_dir():
        raise FedtuneError(
            f"no data in '{place}'", hint="set FEDTUNE_SHARED", code=ExitCode.DATA
        )  # fmt: skip
    return place


def _shakespeare() -> tuple[list[Row], list[Row], list[Row], list[Row]]:
    """Speeches; the last plays of the file are held out."""
    text = (shared() / "data/tinyshakespeare/input.txt").read_text(encoding="utf-8")
    spoken = [part.partition(":\n")[2] for part in text.split("\n\n")]
    rows = [{"text": one} for one in spoken if len(one) > 12]
    cut = int(0.85 * len(rows))
    return rows[:cut], *_dealt(rows[cut:])


def _e2e() -> tuple[list[Row], list[Row], list[Row], list[Row]]:
    """Descriptions of restaurants; other meanings are held out.

    With stories260K's 512 tokens a meaning and its text are 150 tokens: the text alone.
    """
    found = []
    for name in ("devset.csv", "testset_w_refs.csv"):
        with (shared() / "data/e2e_nlg" / name).open(encoding="utf-8", newline="") as file:
            found.append([{"text": row["ref"], "mr": row["mr"]} for row in csv.DictReader(file)])
    meanings = list(dict.fromkeys(row["mr"] for row in found[1]))
    part = {mr: index % 4 for index, mr in enumerate(meanings)}
    held: list[list[Row]] = [[], [], []]
    for row in found[1]:
        held[min(part[row["mr"]], 2)].append({"text": row["text"]})
    mix = np.random.default_rng(0)  # texts of one meaning stand together: a part is of all
    public, valid, test = ([rows[i] for i in mix.permutation(len(rows))] for rows in held)
    return [{"text": row["text"]} for row in found[0]], valid, test, public


def _sst2() -> tuple[list[Row], list[Row], list[Row], list[Row]]:
    """Sentences of film reviews, and whether they praise."""
    parts = {}
    for name in ("train", "dev", "test"):
        path = shared() / f"data/sentence_classification/stsa.binary.{name}"
        lines = path.read_text(encoding="utf-8").splitlines()
        parts[name] = [{"label": line[0], "text": line[2:]} for line in lines if len(line) > 3]
    dev = parts["dev"]
    valid = [row for index, row in enumerate(dev) if index % 4]
    return parts["train"], valid, parts["test"], dev[::4]


def _dealt(rows: list[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Deal rows to choosing, to the result (half of them) and to the public."""
    return rows[1::4], rows[2::4] + rows[3::4], rows[::4]


def _stories() -> ModelConfig:
    return ModelConfig(base=str(shared() / "models/stories260K"))


_WIDE = ("q_proj", "k_proj", "v_proj", "o_proj")


def specs() -> dict[str, Spec]:
    """Return all tasks by name."""
    tiny = ModelConfig(base="fedtune:tiny")
    minilm = ModelConfig(base="fedtune:minilm", task="classification", pooling="mean")
    lrs = (2e-3, 5e-3, 1.2e-2)
    # Whose cost is mostly attention: 16 tokens, or a step takes twice as long.
    found = (
        Spec("shakespeare-stories", _stories(), _shakespeare, 16, ("q_proj", "v_proj"), 0,
             48, 48, 60, lrs),
        Spec("e2e-stories", _stories(), _e2e, 16, ("q_proj", "v_proj"), 0, 48, 48, 60, lrs),
        Spec("sst2-minilm", minilm, _sst2, 14, ("query", "value"), 1, 40, 40, 60,
             (1e-3, 3e-3, 8e-3), task="classification", choosers=3),
        Spec("shakespeare-tiny", tiny, _shakespeare, 14, _WIDE, 2, 32, 32, 60,
             (5e-3, 1.2e-2, 3e-2)),
    )  # fmt: skip
    return {spec.name: spec for spec in found}


TASKS = ("shakespeare-stories", "e2e-stories", "sst2-minilm", "shakespeare-tiny")
"""Names of `specs`, in the order in which they are run."""

_MOST_TEST, _MOST_VALID, _MOST_PUBLIC = 448, 256, 32


def load_task(spec: Spec, folder: Path) -> Loaded:
    """Read a task; hidden states are kept in ``folder``.

    Raises
    ------
    FedtuneError
        Data or model are not there.
    """
    kind = "classification" if spec.task == "classification" else "text"
    data = DataConfig.model_validate(
        {"kind": kind, "pack": False, "holdout": 0.0, "max_length": spec.length}
    )
    labels = ("0", "1") if kind == "classification" else ()
    base = load_base(spec.model, labels, 0)
    settings_of(base.model).use_cache = False
    limits = (None, _MOST_VALID, _MOST_TEST, _MOST_PUBLIC)
    parts = [
        encode(rows[:limit], base.tokenizer, data, labels)
        for rows, limit in zip(spec.rows(), limits, strict=True)
    ]
    if spec.blocks:
        base, parts = last_blocks(base, parts, spec, folder / f"{spec.name}-{spec.length}.npy")
    train, valid, test, public = parts
    return Loaded(spec, base, train, valid, test, public, folder)


def last_blocks(
    base: Base, parts: Sequence[Encoded], spec: Spec, file: Path
) -> tuple[Base, list[Encoded]]:
    """Return the model's last blocks over stored hidden states.

    Examples then hold the number of their row of states in place of tokens.

    Parameters
    ----------
    file : Path
        Where the states are kept, float16 (examples, ``spec.length``, width).
    """
    everything = [ids for part in parts for ids in part.ids]
    if not file.exists():
        states = _states(base, everything, spec)
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}")
        with beside.open("wb") as out:
            np.save(out, states)
        beside.replace(file)
    table = torch.from_numpy(np.load(file, mmap_mode="c"))
    model: Any = share(base.model)  # another task may use the whole model
    inner = model.encoder if spec.task == "classification" else model.model
    look = Lookup(table)
    if spec.task == "classification":
        inner.embeddings = look
        inner.encoder.layer = inner.encoder.layer[-spec.blocks :]
    else:
        inner.embed_tokens = look
        inner.layers = inner.layers[-spec.blocks :]
    found, first = [], 0
    for part in parts:
        ids = tuple(np.full_like(one, first + i) for i, one in enumerate(part.ids))
        found.append(replace(part, ids=ids))
        first += len(part.ids)
    return replace(base, model=model), found


class Lookup(nn.Module):
    """Gives stored hidden states for the number of an example, in place of an embedding.

    Parameters
    ----------
    table : Tensor, shape (examples, length, width), float16
    """

    table: torch.Tensor

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=False)

    def forward(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return (B, T, width) for (B, T), whose first column is the number."""
        return self.table[input_ids[:, 0], : input_ids.shape[1]].float()


def _states(base: Base, ids: Sequence[NDArray[np.int32]], spec: Spec) -> NDArray[np.float16]:
    """Return what goes into the first of the last blocks."""
    model: Any = base.model
    inner = model.encoder if spec.task == "classification" else model.model
    width = settings_of(model).hidden_size
    found = np.zeros((len(ids), spec.length, width), np.float16)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for at in range(0, len(order), 64):
        chosen = order[at : at + 64]
        longest = max(len(ids[i]) for i in chosen)
        tokens = torch.full((len(chosen), longest), base.pad_id)
        mask = torch.zeros_like(tokens)
        for row, i in enumerate(chosen):
            tokens[row, : len(ids[i])] = torch.from_numpy(ids[i].astype(np.int64))
            mask[row, : len(ids[i])] = 1
        with torch.inference_mode():
            out = inner(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        found[chosen, :longest] = out.hidden_states[-1 - spec.blocks].numpy()
    return found

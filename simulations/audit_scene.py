"""The scene of an audit: a tuned model in two parts, rows to attack, and what arrives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedtune.adapters import read
from fedtune.client.backprop import optimizer, tune
from fedtune.client.remote import connect, keep_ends
from fedtune.config import Config
from fedtune.data import Encoded, Federation, batches, encode, load, load_eval, plan_order
from fedtune.errors import ExitCode, FedtuneError
from fedtune.measure import forward_loss
from fedtune.models import Base, share
from fedtune.privacy.cut_noise import noised
from fedtune.privacy.noise import InsecureSeededNoise
from fedtune.seeds import derive
from fedtune.server.body import Body
from fedtune.server.tuned import load_tuned
from fedtune.simulations.audit_view import Disturb, Wire
from fedtune.split import codec as codecs
from fedtune.split.blocks import Cut, cut_of, network
from fedtune.split.rows import Rows, real_of

__all__ = ["Caught", "Say", "Scene", "disturb", "median_norm", "moved", "observe", "open_scene"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Scene:
    """What is attacked: rows, the client's model and body, and what the server knows.

    ``current`` is the server that also aggregates: it has every value handed out.
    ``public`` knows the base model and the seed, not what was tuned.
    """

    config: Config
    base: Base
    labels: tuple[str, ...]
    client: nn.Module
    body: Body
    current: nn.Module
    public: nn.Module
    cut: Cut
    rows: Encoded
    held: Encoded
    special: frozenset[int]
    start: int | None
    seed: int

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        """Return the attacked rows as one batch."""
        order = range(len(self.rows.ids))
        task = self.config.model.task
        return next(iter(batches(self.rows, order, len(order), self.base.pad_id, task)))


@dataclass(frozen=True)
class Caught:
    """What arrived: text places only in ``seen`` (B, T, d), those before in ``front``."""

    seen: torch.Tensor
    front: torch.Tensor
    wire: Wire


def open_scene(
    config: Config, rows: int, length: int, steps: int, head: int | None, tail: int | None,
    held: int, say: Say,
) -> Scene:  # fmt: skip
    """Load and tune the model, and choose the rows."""
    # Rows and candidates are moved nowhere: the audit runs on the processor.
    config = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
    federation = load(config.data, config.seed)
    tuned = load_tuned(config, federation.labels)
    model, base, split = tuned.model, tuned.base, config.tuning.split
    cut = cut_of(model, split.head if head is None else head, split.tail if tail is None else tail)
    seed = derive(config.seed, "audit")
    train, kept = _examples(config, federation, base)
    order = plan_order(len(train.ids), 1.0, seed).tolist()
    if not order or not kept.ids:
        raise FedtuneError(
            f"the experiment has {len(train.ids)} examples and {len(kept.ids)} held-out ones",
            hint="an audit needs some of both: set data.holdout or data.eval",
            code=ExitCode.DATA,
        )
    # Held-out rows are cut alike: the norm of a record grows with its length.
    most = length if config.model.task == "causal-lm" else 0
    chosen = _pick(train, order[:rows], most)
    public = share(model)
    if steps:
        say(f"tuning for {steps} steps, so that there is quality to lose ...")
        settings = config.tuning.model_copy(update={"steps": steps})
        rest = _pick(train, order[rows:] or order, 0)
        tune(model, rest, settings, config.model.task, optimizer(model, settings, settings.lr),
             seed=seed, pad_id=base.pad_id)  # fmt: skip
    current, client, far = share(model), share(model), share(model)
    keep_ends(client, cut)
    first = base.tokenizer("a", verbose=False)["input_ids"][0]
    special = frozenset(int(one) for one in base.tokenizer.all_special_ids)
    return Scene(
        config, base, federation.labels, client.eval(), Body(network(far), cut), current, public,
        cut, chosen, _pick(kept, plan_order(len(kept.ids), 1.0, seed).tolist()[:held], most),
        special, int(first) if int(first) in special else None, seed,
    )  # fmt: skip


def _examples(config: Config, federation: Federation, base: Base) -> tuple[Encoded, Encoded]:
    """Return all clients' examples, and the held-out ones."""
    data, labels = config.data, federation.labels
    train = [encode(one.train, base.tokenizer, data, labels) for one in federation.shards]
    if data.eval:
        held = [encode(load_eval(data, labels), base.tokenizer, data, labels)]
    else:
        held = [encode(one.held, base.tokenizer, data, labels) for one in federation.shards]
    return _joined(train), _joined(held)


def _joined(parts: Sequence[Encoded]) -> Encoded:
    ids = tuple(row for one in parts for row in one.ids)
    targets = tuple(row for one in parts for row in one.targets)
    return Encoded(ids, targets, len(ids), 0, 0)


def _pick(encoded: Encoded, order: Sequence[int], length: int) -> Encoded:
    """Return some examples, cut to ``length`` tokens unless that is 0."""
    end = length or None
    ids = tuple(encoded.ids[i][:end] for i in order)
    targets = tuple(encoded.targets[i][:end] for i in order)
    return Encoded(ids, targets, len(ids), 0, 0)


def disturb(scene: Scene, z: float, clip: float, purpose: str) -> Disturb | None:
    """Return what the client does before it sends: clipping, noise, the experiment's codec.

    The same noise for the same purpose: an audit can be repeated, and protects nobody.
    """
    tuning = scene.config.tuning
    codec, rank = (tuning.split.codec, tuning.split.rank) if tuning.cut else ("none", 1)
    if not z and codec == "none":
        return None
    source = InsecureSeededNoise(derive(scene.seed, purpose))

    def change(values: torch.Tensor, rows: Rows) -> torch.Tensor:
        noisy = noised(values, real_of(rows), clip, z, source) if z else values
        return noisy if codec == "none" else codecs.decode(codecs.encode(noisy, codec, rank=rank))

    return change


def observe(scene: Scene, z: float = 0.0, clips: tuple[float, float] = (1.0, 1.0)) -> Caught:
    """Run one batch forward and backward at the client, and return what arrived."""
    wire = Wire(
        scene.body,
        disturb(scene, z, clips[0], "hidden"),
        disturb(scene, z, clips[1], "gradient"),
    )
    connect(scene.client, wire)
    loss = forward_loss(scene.client, scene.batch, scene.config.model.task)[0].mean()
    loss.backward()  # type: ignore[no-untyped-call]
    scene.client.zero_grad(set_to_none=True)
    length = scene.batch["input_ids"].shape[1]
    sent = wire.sent[0]
    return Caught(sent[:, -length:], sent[:, : sent.shape[1] - length], wire)


def median_norm(values: torch.Tensor, rows: Rows) -> float:
    """Return the median L2 norm of an example's record."""
    norms = [float(row[a:b].norm()) for row, (a, b) in zip(values, real_of(rows), strict=True)]
    return float(np.median(norms)) or 1.0


def moved(scene: Scene) -> bool:
    """Say whether tuning changed anything."""
    one, other = read(scene.current), read(scene.public)
    return any(not np.array_equal(one[name], other[name]) for name in one)

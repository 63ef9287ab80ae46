"""Train RLDP's controller on public text, and write what ``mode = "meta"`` starts from.

Many short DP-SGD runs with the product's own steps, mechanism and controller. Models are
small decoders of bytes, made here from the public half of the standard library and then tuned
on altered text of the other half, whose source anybody may read as well; clip norms, noise,
batches, adapters and learning rates are random. A run is rewarded by how much better its
public loss is than that of the quantile rule on the same task with the same seeds. What the
controller sees stays what it would see in use. Run it with::

    python -m fedtune.simulations.meta_rldp [--episodes N] [--minutes M] [--out DIR]

It ends with a comparison on tasks that it has not seen.
"""

from __future__ import annotations

import argparse
import codecs
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from scipy import stats
from torch import nn

from fedtune.adapters import attach, trainable
from fedtune.client.private_steps import Steps, train_steps
from fedtune.config import TuningConfig
from fedtune.config_privacy import RldpConfig
from fedtune.data import Encoded, stdlib
from fedtune.files import write_atomic
from fedtune.measure import measure
from fedtune.models import Base
from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.mechanism import Mechanism
from fedtune.privacy.noise import InsecureSeededNoise
from fedtune.privacy.per_example import PerExample
from fedtune.privacy.rldp.controller import ACTIONS, STATES, Controller, rldp, settings_of
from fedtune.privacy.rldp.policy import Job, Policy
from fedtune.privacy.rldp.rules import closed_form, quantile_per_adapter, random_walk
from fedtune.privacy.rldp.sac import Sac, SacSettings, Transition
from fedtune.privacy.rldp.sight import Public
from fedtune.privacy.sampling import Poisson
from fedtune.seeds import derive

__all__ = ["Task", "draw_task", "evaluate", "main", "play", "train"]

VOCABULARY, TOKENS, HIDDEN = 128, 16, 32
DEPTHS = (2, 3, 4)
TARGETS = (("q_proj", "v_proj"), ("q_proj", "v_proj", "o_proj"), ("v_proj", "down_proj"))
FACTORS = (0.0, 0.3, 1.0)
HELD_OUT_PACKAGES = ("email", "json", "xml", "logging")

LEARNING = SacSettings(
    hidden=settings_of(RldpConfig()).hidden, gamma=0.97, tau=0.01, lr=7e-4, batch_size=128,
    buffer=20_000, start=150, updates=20, first_temperature=0.2,
)  # fmt: skip

Tokens = NDArray[np.int64]


def _atbash(text: str) -> str:
    lower, upper = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return text.translate(str.maketrans(lower + upper, lower[::-1] + upper[::-1]))


ALTERED: dict[str, Callable[[str], str]] = {
    "plain": str,
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "swapped case": str.swapcase,
    "backwards": lambda text: text[::-1],
}
"""Each makes another domain of the same text, which a model has to learn."""

HELD_OUT_ALTERED: dict[str, Callable[[str], str]] = {"upper case": str.upper, "atbash": _atbash}


@dataclass(frozen=True)
class Task:
    """One run: everything that is random about it.

    Attributes
    ----------
    seed : int
    depth, rank, targets : of the model and its adapter.
    package, altered : of the text.
    noise_multiplier, denominator : z, m.
    clip_norm, lr : where the run begins.
    decisions, interval : T = decisions * interval + 1.
    reward : {"loss", "held-out", "public"}
        What the controller sees of the utility; the first two with their noise.
    factors : bool
    """

    seed: int
    depth: int
    rank: int
    targets: tuple[str, ...]
    package: str
    altered: str
    noise_multiplier: float
    denominator: int
    clip_norm: float
    lr: float
    decisions: int
    interval: int
    reward: str
    factors: bool

    @property
    def steps(self) -> int:
        """T: the last decision closes the last interval."""
        return self.decisions * self.interval + 1


def draw_task(seed: int, held_out: bool = False) -> Task:
    """Return a random task; one of those that are never trained on, if asked."""
    rng = np.random.default_rng(derive(seed, "meta-task", int(held_out)))
    packages = [p for p in stdlib.PRIVATE if (p in HELD_OUT_PACKAGES) == held_out]
    packages = [p for p in packages if p in _texts()]
    altered = HELD_OUT_ALTERED if held_out else ALTERED

    def spread(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(math.log(low), math.log(high))))

    return Task(
        seed=seed, depth=int(rng.choice(DEPTHS)), rank=int(rng.choice((2, 4, 8))),
        targets=TARGETS[int(rng.integers(len(TARGETS)))],
        package=str(rng.choice(packages)), altered=str(rng.choice(list(altered))),
        noise_multiplier=spread(0.4, 2.0), denominator=int(spread(12, 40)),
        clip_norm=spread(0.05, 5.0), lr=spread(2e-3, 2e-2),
        decisions=int(rng.integers(8, 25)), interval=int(rng.integers(1, 5)),
        reward=str(rng.choice(("loss", "held-out", "public"))), factors=bool(rng.random() < 0.3),
    )  # fmt: skip


_memory: dict[str | int, Any] = {}


def _texts() -> dict[str, str]:
    """Return the text of each package, and of the public half, as ASCII."""
    if "texts" not in _memory:
        found: dict[str, list[str]] = {}
        for half, public in ((stdlib.PRIVATE, False), (stdlib.PUBLIC, True)):
            for row in stdlib.read_half(half):
                found.setdefault("public" if public else row["client"], []).append(row["text"])
        _memory["texts"] = {
            name: "\n".join(rows)[: 400_000 if name == "public" else 60_000]
            for name, rows in found.items()
        }
    texts: dict[str, str] = _memory["texts"]
    return texts


def _blocks(text: str) -> Tokens:
    """Return blocks of bytes; shape (n, TOKENS)."""
    raw = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64)
    return raw[: len(raw) // TOKENS * TOKENS].reshape(-1, TOKENS)


def _encoded(blocks: Tokens) -> Encoded:
    rows = tuple(blocks)
    return Encoded(rows, rows, len(rows), 0, 0)


def _base(depth: int, steps: int = 300) -> Base:
    """Return a small decoder that has read the public half."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if depth not in _memory:
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN,
            num_hidden_layers=depth, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=2 * TOKENS, tie_word_embeddings=True,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(depth)
            model: Any = LlamaForCausalLM(config)
            blocks = torch.from_numpy(_blocks(_texts()["public"]))
            optim = torch.optim.AdamW(model.parameters(), lr=3e-3)
            for _ in range(steps):
                given = blocks[torch.randint(len(blocks), (48,))]
                loss = model(input_ids=given, labels=given, use_cache=False).loss
                optim.zero_grad()
                loss.backward()
                optim.step()
        _memory[depth] = Base(model.eval().requires_grad_(False), None, 0)
    found: Base = _memory[depth]
    return found


@dataclass(frozen=True)
class Played:
    """What came of a run: public utility after each interval, and transitions."""

    utility: NDArray[np.float64]
    transitions: list[Transition]
    norms: tuple[float, ...]


def play(task: Task, make: Callable[[Job], Policy], noise: int = 0) -> Played:
    """Run one task under a policy; the same seeds for every policy.

    Parameters
    ----------
    task : Task
    make : callable
        Makes the policy of a job.
    noise : int
        Another number gives other coins and noise.
    """
    altered = {**ALTERED, **HELD_OUT_ALTERED}[task.altered]
    blocks = _blocks(altered(_texts()[task.package]))
    rng = np.random.default_rng(derive(task.seed, "split"))
    order = rng.permutation(len(blocks))
    public, training = _encoded(blocks[order[:64]]), _encoded(blocks[order[64:1600]])
    tuning = TuningConfig(adapter="lora", rank=task.rank, targets=task.targets)
    model = attach(_base(task.depth), tuning, "causal-lm", task.seed)
    parameters = trainable(model)
    share = 0.2 if task.reward == "held-out" else 0.0
    held = np.random.default_rng(derive(task.seed, "held")).random(len(training.ids)) < share
    mechanism = Mechanism(
        Unit.EXAMPLE, Relation.ADD_OR_REMOVE_ONE, Poisson(task.denominator / len(training.ids)),
        task.noise_multiplier, float(task.denominator), micro_batch=32,
    )  # fmt: skip
    settings = RldpConfig.model_validate(
        {"mode": "federated", "reward": task.reward, "interval": task.interval,
         "factors": task.factors, "held_out": 0.2,
         "public": "standard library" if task.reward == "public" else ""}
    )  # fmt: skip
    job = Job(
        {n: p.numel() for n, p in parameters.items()}, task.steps, task.noise_multiplier,
        float(task.denominator), task.clip_norm, derive(task.seed, "policy", noise),
        utility=lambda: Public(-_loss(model, public)), options={"rldp": settings},
    )  # fmt: skip
    policy = make(job)
    optim = torch.optim.AdamW(parameters.values(), lr=task.lr, weight_decay=0.0)
    steps = Steps(
        model, PerExample(model), training, mechanism, optim,
        InsecureSeededNoise(derive(task.seed, "noise", noise)), policy, "causal-lm", 64, 0,
        held if share else None, share,
    )  # fmt: skip
    found: list[float] = []

    def after(step: int) -> None:
        if (step + 1) % task.interval == 0:
            found.append(-_loss(model, public))

    train_steps(steps, task.steps, after=after)
    made = policy.transitions() if isinstance(policy, Controller) else {}
    rows = [
        Transition(s, a, float(r), n, bool(d))
        for s, a, r, n, d in zip(*(made[k] for k in _PARTS), strict=True)
    ] if made else []  # fmt: skip
    return Played(np.array(found), rows, policy.shape().norms)


_PARTS = ("state", "action", "reward", "next_state", "done")


def _loss(model: nn.Module, encoded: Encoded) -> float:
    counts = measure(model, encoded, "causal-lm", batch_size=64, pad_id=0)
    return min(counts.loss / counts.units, 20.0) if math.isfinite(counts.loss) else 20.0


def _acting(sac: Sac, *, mean: bool) -> Callable[[Job], Policy]:
    """Return a maker of controllers that act as this one does, and leave learning to us."""

    def make(job: Job) -> Policy:
        controller = rldp(job)
        controller.load_actor(sac.actor_state())
        controller.mean = mean
        return controller

    return make


def rewarded(played: Played, base: NDArray[np.float64]) -> list[Transition]:
    """Replace the noisy rewards by the gain over the baseline, per interval.

    In units of what the baseline gains per interval; the last one ends the run.
    """
    gap = played.utility - base
    unit = max(abs(float(base[-1] - base[0])) / len(base), 1e-3)
    count = len(played.transitions)
    # Transition k lies between the utilities at two decisions; the last ones are the newest.
    gains = np.diff(gap)[-count:] / unit
    return [
        replace(one, reward=float(np.clip(gain, -2.0, 2.0)), done=number == count - 1)
        for number, (one, gain) in enumerate(zip(played.transitions, gains, strict=True))
    ]


def train(
    sac: Sac, episodes: int, until: float, seed: int, say: Callable[[str], None], first: int = 0
) -> int:
    """Teach ``sac`` from so many runs, or until the clock says so; return how many there were.

    ``first`` runs, a multiple of 3, are done already.
    """
    scores: list[float] = []
    base: NDArray[np.float64] = np.zeros(0)
    task = draw_task(seed)
    for number in range(first, episodes):
        if number % 3 == 0 and time.monotonic() > until:
            return number
        if number % 3 == 0:  # one baseline for three runs of the same task
            task = draw_task(derive(seed, "train", number) % 2**31)
            base = play(task, quantile_per_adapter).utility
        played = play(task, _acting(sac, mean=False))
        made = rewarded(played, base)
        for one in made:
            sac.learn(one)
        scores.append(_relative(played.utility, base))
        if (number + 1) % 30 == 0:
            recent = float(np.mean(scores[-30:]))
            say(f"{number + 1} runs, {sac.transitions} decisions: gain {recent:+.3f}, "
                f"temperature {sac.temperature:.3f}")  # fmt: skip
    return episodes


def _relative(utility: NDArray[np.float64], base: NDArray[np.float64]) -> float:
    """Return the final gain over the baseline, as a share of what the baseline gained."""
    gained = max(abs(float(base[-1] - base[0])), 1e-2)
    return float(np.clip((utility[-1] - base[-1]) / gained, -2.0, 2.0))


def damped(actor: dict[str, NDArray[Any]], factor: float) -> dict[str, NDArray[Any]]:
    """Return an actor whose mean action, before it is squashed, is so many times its own."""
    last = max(name for name in actor if name.startswith("actor.") and name.endswith(".weight"))
    found = dict(actor)
    for name in (last, last.replace("weight", "bias")):
        found[name] = actor[name].copy()
        found[name][..., :ACTIONS] *= np.float32(factor)
    return found


def choose(sac: Sac, tasks: int) -> tuple[float, dict[str, float]]:
    """Return how much of what was learnt to keep, by fresh tasks of the kind trained on.

    Little training makes bold actions out of chance. Nothing of it is kept unless it is
    better than zeros, which go on with the quantile rule.
    """
    scores: dict[float, list[float]] = {factor: [] for factor in FACTORS}
    for number in range(tasks):
        task = draw_task(20_000 + number)
        base = play(task, quantile_per_adapter).utility
        for factor, found in scores.items():
            tried = Sac(STATES, ACTIONS, LEARNING, 0)
            tried.load_actor(damped(sac.actor_state(), factor))
            found.append(_relative(play(task, _acting(tried, mean=True)).utility, base))
    means = {factor: float(np.mean(found or [0.0])) for factor, found in scores.items()}
    best = max(FACTORS, key=lambda factor: means[factor])
    return best, {str(factor): round(mean, 4) for factor, mean in means.items()}


def evaluate(sac: Sac, tasks: int) -> dict[str, Any]:
    """Compare policies with the quantile rule per adapter, on tasks never trained on.

    Returns
    -------
    dict
        For each policy the mean relative gain in loss over the rule, the half width of its
        95 % t-interval, and the mean difference in nats.
    """
    arms: dict[str, Callable[[Job], Policy]] = {
        "meta": _acting(sac, mean=True), "random": random_walk, "closed-form": closed_form,
    }  # fmt: skip
    gains: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for number in range(tasks):
        task = draw_task(10_000 + number, held_out=True)
        base = play(task, quantile_per_adapter).utility
        for name, make in arms.items():
            utility = play(task, make).utility
            gains[name].append((_relative(utility, base), float(utility[-1] - base[-1])))
    table: dict[str, Any] = {"tasks": tasks}
    for name, rows in gains.items():
        values = np.array(rows).reshape(-1, 2)
        half = math.nan
        if tasks > 1:
            half = float(stats.t.ppf(0.975, tasks - 1) * stats.sem(values[:, 0]))
        table[name] = {
            "relative_gain": round(float(values[:, 0].mean()), 4), "half": round(half, 4),
            "nats": round(float(values[:, 1].mean()), 5),
        }  # fmt: skip
    return table


def _say(text: str) -> None:
    print(text, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, train, compare, and write the policy and its note."""
    parser = argparse.ArgumentParser(description="Train RLDP's controller on public text.")
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, at most")
    parser.add_argument("--tasks", type=int, default=20, help="held out, for the comparison")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True, help="goes on from what is there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    sac = Sac(STATES, ACTIONS, LEARNING, args.seed)
    sac.load_actor(damped(sac.actor_state(), 0.1))
    began = time.monotonic()
    for depth in DEPTHS:
        _base(depth)
    _say(f"models ready after {time.monotonic() - began:.0f} s")
    until = time.monotonic() + 60.0 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    whole, runs = args.out / "training.safetensors", 0
    if whole.exists():
        kept = load_file(whole)
        runs = int(kept.pop("runs")[0])
        sac.restore(kept)
    runs = train(sac, args.episodes, until, args.seed, _say, runs)
    write_atomic(whole, save({**sac.state(), "runs": np.array([runs])}))
    minutes = (time.monotonic() - began) / 60.0
    factor, tried = choose(sac, args.tasks // 2)
    sac.load_actor(damped(sac.actor_state(), factor))
    file = args.out / "policy.safetensors"
    write_atomic(file, save(sac.actor_state()))
    file.chmod(0o644)
    table = evaluate(sac, args.tasks)
    note = {
        "made by": "python -m fedtune.simulations.meta_rldp",
        "runs": runs, "decisions": sac.transitions, "minutes": round(minutes, 1),
        "seed": args.seed, "learning": asdict(LEARNING), "models": DEPTHS, "tokens": TOKENS,
        "text": "standard library of Python", "held out": [*HELD_OUT_PACKAGES, *HELD_OUT_ALTERED],
        "damped": factor, "tried": tried, "comparison": table,
    }  # fmt: skip
    (args.out / "policy.json").write_text(json.dumps(note, indent=2) + "\n", "utf-8")
    print(json.dumps(table))


if __name__ == "__main__":
    main()

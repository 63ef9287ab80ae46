"""What each way of tuning costs one client in one round: bytes, arithmetic, memory, time.

Estimates, before anything runs. A product with P weights is 2 P operations per token, its
gradient at the input as much again, and at the weights, where they train, once more (Kaplan
et al. 2020, section 2.1); attention adds 4 T d per token and block, and 8 T d backward.
Tuned numbers and their updates travel as float32. What crosses the cut is counted as the
codec makes it; names and frames, under 1 %, are not. ``flops.py`` counts operations exactly,
on the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedtune.split.codec import Codec, bytes_of

__all__ = ["Cost", "Shape", "Work", "advice", "break_even_tokens", "costs", "output_share"]

FLOAT = 4
ADAM = 4 * FLOAT
"""Bytes of a trained number: itself, its gradient, two moments of AdamW."""
KEPT = 17
"""Float32 numbers of width d that a block keeps per token for backward (Korthikanti et al.
2022, eq. 1 without the attention maps: 34 bytes in 16 bit)."""


@dataclass(frozen=True)
class Shape:
    """A model and its cut, in numbers.

    Attributes
    ----------
    total : int
        Parameters of the whole model.
    client : int
        Of these with the client: embeddings, head, tail, output layer.
    looked_up : int
        Tables that are read and not multiplied: embeddings, unless tied to the output.
    output : int
        Weights of the output layer that are multiplied for every token, d V; 0 for classifiers.
    width, blocks, client_blocks : int
        d, blocks, and blocks of head and tail together.
    lora : int
        Parameters of LoRA on every linear layer of the whole model.
    trained : int
        Of split tuning: prompts and tail.
    before : bool
        Something before the cut is trained, such as prompts: gradients then cross it as well.
    """

    total: int
    client: int
    looked_up: int
    output: int
    width: int
    blocks: int
    client_blocks: int
    lora: int
    trained: int
    before: bool = True


@dataclass(frozen=True)
class Work:
    """What one client does in one round.

    Attributes
    ----------
    tokens : int
        Of its training data, padding included.
    length, batch : int
        T of an example, and examples in a batch.
    epochs, local_epochs : float
        Passes over the data: of the split phase and of others' tuning; of the first phase.
    keep : float
        Share of the examples that crosses the cut.
    prompt : int
        Virtual tokens in front of each example.
    codec : str
    rank : int
        Of "lowrank".
    rounds : int
        What is sent once in a run is spread over so many.
    pool : int
        K, coefficients of a seed pool.
    """

    tokens: int
    length: int
    batch: int = 16
    epochs: float = 1.0
    local_epochs: float = 1.0
    keep: float = 1.0
    prompt: int = 20
    codec: Codec = "none"
    rank: int = 8
    rounds: int = 1
    pool: int = 4096


@dataclass(frozen=True)
class Cost:
    """Of one client and round.

    Attributes
    ----------
    method : str
    bytes : int
        Both directions.
    flops : int
    memory : int
        Bytes: weights, training state, activations of a batch.
    seconds : float or None
        For the bytes alone; None: the bandwidth is not known.
    """

    method: str
    bytes: int
    flops: int
    memory: int
    seconds: float | None


def break_even_tokens(lora: int, width: int) -> int:
    """Return the tokens of a client and round below which a cut sends less than LoRA.

    Hidden states and gradients both ways are 4 d numbers per token, an adapter both ways
    is 2 P, of the same width: P / (2 d) (``research/split_peft.md`` 6).

    Parameters
    ----------
    lora : int
        P, parameters of LoRA on the whole model.
    width : int
        d.

    Examples
    --------
    Llama-3.2-1B and Llama-3.1-8B, rank 16 on every linear layer:

    >>> break_even_tokens(11_272_192, 2048), break_even_tokens(41_943_040, 4096)
    (2752, 5120)
    """
    return lora // (2 * width)


def output_share(width: int, vocabulary: int, multiplied: int) -> float:
    """Return the output layer's share of a forward pass: 2 d V of 2 P operations a token.

    Parameters
    ----------
    multiplied : int
        P, the weights that a token is multiplied with, the output layer included.

    Examples
    --------
    Llama-3.2-1B (1.236 thousand million weights, tied), Llama-3.1-8B (7.505 of 8.030):

    >>> [round(output_share(d, 128_256, p), 2)
    ...  for d, p in ((2048, 1_235_814_400), (4096, 7_504_924_672))]
    [0.21, 0.07]
    """
    return width * vocabulary / multiplied


def costs(shape: Shape, work: Work, bandwidth: float = 0.0) -> tuple[Cost, ...]:
    """Return what each way of tuning costs a client in a round.

    Parameters
    ----------
    shape : Shape
    work : Work
    bandwidth : float
        Of the client, in megabits per second; 0: not known.

    Returns
    -------
    tuple of Cost
        full, LoRA, prompts and seeds, on the whole model; the cut, with hidden states sent at
        each step, or once in the run.

    Examples
    --------
    Llama-3.2-1B with one block at each end and 20 prompts, bf16 at the cut, 10,000 tokens:

    >>> shape = Shape(total=1_235_814_400, client=384_000_000, looked_up=0, output=262_668_288,
    ...     width=2048, blocks=16, client_blocks=2, lora=11_272_192, trained=745_472)
    >>> for cost in costs(shape, Work(10_000, 100, codec="bf16"), bandwidth=10):
    ...     print(f"{cost.method:11} {cost.bytes / 1e6:7.1f} MB {cost.seconds:6.0f} s")
    full         9886.5 MB   7909 s
    lora           90.2 MB     72 s
    prompts         0.3 MB      0 s
    seeds           0.0 MB      0 s
    split each    202.6 MB    162 s
    split once    161.6 MB    129 s
    """
    t, d = work.length, shape.width
    examples = work.tokens / t
    passes = work.epochs * examples
    longer = t + work.prompt
    whole, ends = _forward(shape, t, part=False), _forward(shape, t, part=True)
    step = whole + _backward(shape, t, part=False)
    prompted, ends_step = (
        _forward(shape, longer, part=part) + _backward(shape, longer, part=part)
        for part in (False, True)
    )
    numbers = work.prompt * d
    states = ADAM - FLOAT
    found: list[tuple[str, float, float, int]] = [
        ("full", 2 * FLOAT * shape.total, (step + 2 * t * (shape.total - shape.looked_up)) * passes,
         FLOAT * shape.total + states * shape.total + _kept(shape, work, t, part=False)),
        ("lora", 2 * FLOAT * shape.lora, (step + 6 * shape.lora * t) * passes,
         FLOAT * shape.total + ADAM * shape.lora + _kept(shape, work, t, part=False)),
        ("prompts", 2 * FLOAT * numbers, prompted * passes,
         FLOAT * shape.total + ADAM * numbers + _kept(shape, work, longer, part=False)),
        # All coefficients down in float32, at most all up in 16 bit; two forward passes a step.
        ("seeds", 6 * work.pool, 2 * whole * passes,
         FLOAT * shape.total + _kept(replace(shape, blocks=1), work, t, part=False)),
    ]  # fmt: skip
    split = (
        work.local_epochs * examples * (ends_step + 6 * shape.trained * longer)
        + (examples * ends if work.keep < 1 else 0)  # scores of all, to choose by
        + work.keep * passes * (ends_step + 6 * shape.trained * longer)
    )
    memory = FLOAT * shape.client + ADAM * shape.trained
    memory += _kept(shape, work, longer, part=True)
    for once in (False, True):
        crossed = _crossed(shape, work, once=once) + 2 * FLOAT * shape.trained
        found.append((f"split {'once' if once else 'each'}", crossed, split, memory))
    return tuple(
        Cost(name, round(size), round(flops), round(held),
             size * 8 / (bandwidth * 1e6) if bandwidth else None)
        for name, size, flops, held in found
    )  # fmt: skip


def advice(
    shape: Shape, work: Work, found: tuple[Cost, ...], memory: float = 0.0, release: str = "each"
) -> tuple[str, ...]:
    """Say in plain words whether the cut is the right choice here.

    Parameters
    ----------
    shape : Shape
    work : Work
    found : tuple of Cost
        Of ``costs``.
    memory : float
        What a client can hold, in bytes; 0: not known.
    release : str
        "each" or "once", the one that is set.

    Examples
    --------
    >>> shape = Shape(total=1_235_814_400, client=384_000_000, looked_up=0, output=262_668_288,
    ...     width=2048, blocks=16, client_blocks=2, lora=11_272_192, trained=745_472)
    >>> work = Work(100_000, 100)
    >>> print(advice(shape, work, costs(shape, work), memory=64e9)[0])
    split is the wrong choice: this client can hold the model (LoRA takes 11,151 MB of 64,000 MB), \
and LoRA on the whole model sends 44 times less
    """
    by = {cost.method: cost for cost in found}
    split, lora = by[f"split {release}"], by["lora"]
    lines = []
    ratio = split.bytes / lora.bytes
    less = f"LoRA on the whole model sends {_times(ratio)} less"
    if memory and lora.memory <= memory:
        room = f"LoRA takes {_mb(lora.memory)} of {_mb(memory)}"
        if ratio > 1:
            lines.append(f"split is the wrong choice: this client can hold the model ({room}), "
                         f"and {less}")  # fmt: skip
        else:
            lines.append(f"this client can hold the model ({room}); split sends "
                         f"{_times(1 / ratio)} less than LoRA on it")  # fmt: skip
    elif memory and split.memory > memory:
        lines.append(f"split does not fit either: {_mb(split.memory)} of {_mb(memory)}; set a "
                     "smaller head, tail or batch")  # fmt: skip
    elif memory:
        lines.append(f"split is what fits: {_mb(split.memory)} of {_mb(memory)}, where LoRA on the "
                     f"whole model takes {_mb(lora.memory)}")  # fmt: skip
    elif ratio > 1:
        lines.append(f"{less}: split is for clients that cannot hold the model "
                     f"({_mb(lora.memory)} with LoRA; set tuning.split.memory_mb)")  # fmt: skip
    even = break_even_tokens(shape.lora, shape.width)
    crossing = round(work.tokens * work.keep * work.epochs)
    crossed = split.bytes - 2 * FLOAT * shape.trained
    here = round(crossing * max(0, lora.bytes - 2 * FLOAT * shape.trained) / crossed)
    lines.append(f"break-even with LoRA: {even:,} tokens per client and round where both travel "
                 f"at equal width, {here:,} with these settings; {crossing:,} cross the cut "
                 "here")  # fmt: skip
    if shape.output:
        ends, whole = (_forward(shape, work.length, part=part) for part in (True, False))
        share = 2 * work.length * shape.output / whole
        lines.append(f"the output layer over the vocabulary is {share:.0%} of a forward pass; it "
                     f"is the client's, whose share with it is {ends / whole:.0%}")  # fmt: skip
    return tuple(lines)


# ---------------------------------------------------------------- estimates


def _forward(shape: Shape, length: int, *, part: bool) -> float:
    """Return the operations of a forward pass over one example, of the whole or the ends."""
    weights = (shape.client if part else shape.total) - shape.looked_up
    blocks = shape.client_blocks if part else shape.blocks
    return float(length * (2 * weights + 4 * length * shape.width * blocks))


def _backward(shape: Shape, length: int, *, part: bool) -> float:
    """Return the operations of the gradients at the inputs; of attention, at both factors."""
    blocks = shape.client_blocks if part else shape.blocks
    attention = 4 * length * shape.width * blocks
    return _forward(shape, length, part=part) + float(length * attention)


def _kept(shape: Shape, work: Work, length: int, *, part: bool) -> int:
    """Return the bytes of activations, and of the logits with their gradient, of a batch."""
    blocks = shape.client_blocks if part else shape.blocks
    words = shape.output // shape.width
    return FLOAT * work.batch * length * (KEPT * shape.width * blocks + 3 * words)


def _crossed(shape: Shape, work: Work, *, once: bool) -> float:
    """Return the bytes of hidden states and gradients at the cut, all steps of a round."""
    kept = work.keep * work.tokens / work.length
    longer = work.length + work.prompt

    def size(length: int) -> int:
        return bytes_of(work.codec, (1, length, shape.width), rank=work.rank) if length else 0

    down = size(longer)
    # Gradients cross only where something before the cut waits for them.
    back = 2 * size(longer) if shape.before else 0
    if not once:
        return float(work.epochs * kept * (size(longer) + down + back))
    fresh = work.prompt if shape.before else 0
    first = kept * size(work.length) / work.rounds
    back = size(longer) + size(fresh) if shape.before else 0
    return float(first + work.epochs * kept * (size(fresh) + down + back))


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:,.0f} times"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.{0 if size >= 1e8 else 1}f} MB"

"""Codecs at the cut: what comes back, how large it is, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedtune.errors import FedtuneError
from fedtune.split.codec import (
    CODECS,
    Codec,
    Packed,
    Part,
    bytes_of,
    decode,
    encode,
    nbytes,
    relative_error,
)

SOME = settings(max_examples=60, deadline=None)
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
HIDDEN = arrays(np.float32, array_shapes(min_dims=3, max_dims=3, max_side=7), elements=FLOATS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wired(packed: Packed) -> Packed:
    """As it comes off a wire: read-only bytes."""
    parts = tuple(dataclasses.replace(part, data=bytes(part.data)) for part in packed.parts)
    return dataclasses.replace(packed, parts=parts)


@SOME
@given(HIDDEN)
def test_none_is_exact_to_the_bit(values: np.ndarray) -> None:
    back = decode(wired(encode(torch.from_numpy(values), "none")))
    assert back.dtype == torch.float32
    assert back.numpy().tobytes() == values.tobytes()


@SOME
@given(HIDDEN)
def test_bf16_is_within_half_a_step(values: np.ndarray) -> None:
    back = decode(wired(encode(torch.from_numpy(values), "bf16"))).numpy()
    # Normal numbers: 8 bits of mantissa, so half of 2^-7; below 2^-126 the step is 2^-133.
    assert (np.abs(back - values) <= np.maximum(np.abs(values) * 2.0**-8, 2.0**-134)).all()


def test_bf16_rounds_to_even() -> None:
    between = torch.tensor([[[1 + 2.0**-8, 1 + 3 * 2.0**-8]]])  # halfway, down and up
    assert decode(encode(between, "bf16")).tolist() == [[[1.0, 1 + 2.0**-6]]]


@SOME
@given(HIDDEN)
def test_int8_is_within_half_a_step_of_its_row(values: np.ndarray) -> None:
    back = decode(wired(encode(torch.from_numpy(values), "int8"))).numpy().astype(np.float64)
    largest = np.abs(values.astype(np.float64)).max(axis=2, keepdims=True)
    step = largest / 127
    # Below 2^-126 a scale has few digits left of its own.
    assert (np.abs(back - values) <= step * 0.5001 + 127 * 2.0**-149).all()


def test_int8_rounds_half_to_even_and_leaves_zero_rows() -> None:
    row = torch.tensor([[[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]]])
    assert decode(encode(row, "int8")).tolist() == [[[127.0, 0.0, 2.0, -2.0], [0.0] * 4]]


def test_one_scale_a_token_keeps_other_tokens_from_an_outlier() -> None:
    hidden = normal(2, 16, 64)
    hidden[0, 0, 3] = 1e4
    back = decode(encode(hidden, "int8"))
    assert relative_error(hidden[:, 1:], back[:, 1:]) < 0.01
    assert relative_error(hidden[0, :1, 4:], back[0, :1, 4:]) == 1.0  # its own token's pays


@SOME
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
def test_lowrank_leaves_what_the_singular_values_say(b: int, t: int, d: int, rank: int) -> None:
    hidden = normal(b, t, d, seed=b * 1000 + t * 100 + d * 10 + rank)
    back = decode(wired(encode(hidden, "lowrank", rank=rank)))
    rest = hidden - hidden.mean(1, keepdim=True)
    lost = float((torch.linalg.svdvals(rest)[:, rank:] ** 2).sum())
    error = float((hidden - back).norm() ** 2)
    # Factors in bf16 add up to two roundings of 2^-9 to each singular direction.
    assert error <= lost * 1.05 + float(rest.norm() ** 2) * (2 * 2.0**-8) ** 2 * 4 + 1e-9
    assert error >= lost * 0.95 - 1e-3


def test_lowrank_against_a_reference_is_smaller_where_little_changed() -> None:
    before = normal(3, 20, 32)
    now = before + 0.01 * normal(3, 20, 1, seed=1) * normal(3, 1, 32, seed=2)
    alone = encode(now, "lowrank", rank=1)
    held = encode(now, "lowrank", rank=1, reference=before)
    assert nbytes(held) == bytes_of("lowrank", (3, 20, 32), rank=1, reference=True) < nbytes(alone)
    assert relative_error(now, decode(held, before)) < 1e-4
    assert relative_error(now, decode(alone)) > 0.5
    with pytest.raises(FedtuneError, match="nothing held"):
        decode(held)
    with pytest.raises(FedtuneError, match="a reference of shape"):
        decode(held, before[:2])


@pytest.mark.parametrize("name", CODECS)
def test_bytes_are_as_foretold_and_the_same_every_time(name: Codec) -> None:
    hidden = normal(3, 17, 24)
    one, two = (encode(hidden, name, rank=5) for _ in range(2))
    assert nbytes(one) == sum(len(p.data) for p in one.parts) == bytes_of(name, (3, 17, 24), rank=5)
    assert [bytes(p.data) for p in one.parts] == [bytes(p.data) for p in two.parts]


@pytest.mark.parametrize("name", CODECS)
def test_what_is_decoded_can_be_written_to_and_changes_nothing_else(name: Codec) -> None:
    hidden = normal(2, 3, 8)
    kept = hidden.clone()
    packed = encode(hidden.requires_grad_(), name)
    decode(packed).zero_()
    assert torch.equal(hidden.detach(), kept)
    assert relative_error(kept, decode(packed)) < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_none_keeps_narrow_numbers_as_they_are(dtype: torch.dtype) -> None:
    hidden = normal(2, 3, 8).to(dtype)
    packed = encode(hidden, "none")
    assert nbytes(packed) == 2 * hidden.numel()
    back = decode(wired(packed))
    assert back.dtype == dtype
    assert torch.equal(back, hidden)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_sent(name: Codec, odd: float) -> None:
    hidden = normal(2, 3, 8)
    hidden[1, 2, 5] = odd
    with pytest.raises(FedtuneError, match="NaN or an infinity"):
        encode(hidden, name)


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_what_would_become_infinite_is_not_sent(name: Codec) -> None:
    with pytest.raises(FedtuneError, match="NaN or an infinity"):
        encode(torch.full((1, 1, 2), torch.finfo(torch.float32).max), name)


def forged(name: Codec, part: int, /, **changes: object) -> Packed:
    packed = wired(encode(normal(2, 4, 8), name, rank=2))
    parts = list(packed.parts)
    parts[part] = dataclasses.replace(parts[part], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(packed, parts=tuple(parts))


NAN = np.array([np.nan], np.float32).tobytes()
BF16_INF = b"\x80\x7f"


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (forged("none", 0, data=NAN * 64), "NaN"),
        (forged("none", 0, data=b"\0" * 255), "255 bytes"),
        (forged("none", 0, dtype="int8"), "type 'int8'"),
        (forged("none", 0, name="labels"), "parts"),
        (forged("none", 0, shape=(64,)), "parts"),
        (forged("bf16", 0, data=BF16_INF * 64), "NaN"),
        (forged("bf16", 0, dtype="float32"), "parts"),
        (forged("int8", 1, data=NAN * 8), "NaN"),
        (forged("int8", 1, data=np.full(8, -1, np.float32).tobytes()), "negative scale"),
        (forged("int8", 1, data=np.full(8, 3e38, np.float32).tobytes()), "NaN"),
        (forged("int8", 0, data=b"\1" * 65), "65 bytes"),
        (forged("lowrank", 0, shape=(2, 4, 9)), "rank 9"),
        (forged("lowrank", 0, shape=()), "rank 0"),
        (forged("lowrank", 1, data=BF16_INF * 32), "NaN"),
        (forged("lowrank", 2, dtype="bfloat16"), "parts"),
        (Packed("gzip", (1, 1, 1), ()), "codec 'gzip'"),
        (Packed("none", (1, 1), (Part("values", "float32", (1, 1), bytes(4)),)), "shape"),
        (Packed("none", (0, 1, 1), (Part("values", "float32", (0, 1, 1), b""),)), "shape"),
        (Packed("none", (-1, -1, 1), (Part("values", "float32", (-1, -1, 1), bytes(4)),)), "shape"),
        (Packed("int8", (1, 1, 1), ()), "parts"),
        (Packed("lowrank", (1, 1, 1), ()), "rank 0"),
    ],
)
def test_a_peer_that_lies_is_refused(packed: Packed, words: str) -> None:
    with pytest.raises(FedtuneError, match=words):
        decode(packed)


def test_few_bytes_cannot_claim_to_be_many() -> None:
    side = 1 << 15
    parts = (
        Part("left", "bfloat16", (1, side, 1), bytes(2 * side)),
        Part("right", "bfloat16", (1, 1, side), bytes(2 * side)),
        Part("mean", "float32", (1, side), bytes(4 * side)),
    )
    with pytest.raises(FedtuneError, match="at the cut"):
        decode(Packed("lowrank", (1, side, side), parts))
    with pytest.raises(FedtuneError, match="at the cut"):
        decode(encode(normal(1, 4, 8), "none"), largest=31)


def test_wrong_arguments_are_named() -> None:
    hidden = normal(1, 4, 8)
    with pytest.raises(FedtuneError, match="codec 'zip'"):
        encode(hidden, "zip")  # type: ignore[arg-type]
    with pytest.raises(FedtuneError, match="rank=0"):
        encode(hidden, "lowrank", rank=0)
    with pytest.raises(FedtuneError, match="shape"):
        encode(hidden[0], "none")
    with pytest.raises(FedtuneError, match="int64"):
        encode(torch.ones(1, 2, 3, dtype=torch.long), "none")


def test_relative_error() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero, one) == math.inf
    assert relative_error(one, zero) == 1.0

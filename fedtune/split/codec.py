"""Fewer bytes at the cut: a hidden state or its gradient as the parts that travel.

``none``     the numbers as they are, exact to the bit.
``bf16``     rounded to nearest even; relative error up to 2^-8.
``int8``     a row of d values per token: x / (max|x| / 127), rounded half to even. One scale
             a token, since one a tensor is ruined by a few large features (SplitLite, Table II);
             a token's own large features still cost its small ones their digits.
``lowrank``  per example, the r largest singular directions of what the reference (or, without
             one, the mean over its tokens) does not explain; SplitLite's residual. Factors bf16.

What is decoded came from a peer: names, sizes and every value are checked before use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.errors import ExitCode, FedtuneError

__all__ = [
    "CODECS",
    "LARGEST",
    "Codec",
    "Packed",
    "Part",
    "bytes_of",
    "decode",
    "encode",
    "nbytes",
    "relative_error",
]

Codec = Literal["none", "bf16", "int8", "lowrank"]
CODECS: tuple[Codec, ...] = get_args(Codec)

LARGEST = 1 << 28
"""Most values that one decoded tensor may have (1 GiB): few bytes can claim to be many."""

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RAW = {"float32": torch.int32, "bfloat16": torch.int16, "float16": torch.int16}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One piece of a packed tensor.

    Attributes
    ----------
    name : str
        "values", "scales", "left", "right" or "mean".
    dtype : str
        "float32", "bfloat16", "float16" or "int8"; little endian.
    shape : tuple of int
    data : memoryview or bytes
        Its bytes, in C order. ``encode`` gives a view of its own memory.
    """

    name: str
    dtype: str
    shape: Shape
    data: memoryview | bytes


@dataclass(frozen=True)
class Packed:
    """A tensor of shape (B, T, d) as it travels."""

    codec: str
    shape: Shape
    parts: tuple[Part, ...]


def encode(
    tensor: Tensor, name: Codec, *, rank: int = 8, reference: Tensor | None = None
) -> Packed:
    """Pack a hidden state, or its gradient.

    Parameters
    ----------
    tensor : Tensor
        (B, T, d), floating point. "none" keeps its type; the others take it as float32.
    name : str
        One of ``CODECS``.
    rank : int
        Of "lowrank", at least 1; more than min(T, d) is min(T, d).
    reference : Tensor or None
        (B, T, d), what the other side holds of the same examples. Only "lowrank" uses it.

    Raises
    ------
    FedtuneError
        NaN, an infinity, a value that the codec would make one, or a wrong shape.

    Examples
    --------
    >>> hidden = torch.arange(24.0).reshape(1, 3, 8)
    >>> [(name, nbytes(encode(hidden, name, rank=1))) for name in CODECS]
    [('none', 96), ('bf16', 48), ('int8', 36), ('lowrank', 54)]
    """
    if name not in CODECS:
        raise _refuse(f"codec '{name}'", f"one of {', '.join(CODECS)}")
    if tensor.dim() != 3 or 0 in tensor.shape or tensor.dtype not in _TORCH.values():
        raise _refuse(f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} at the cut")
    values = tensor.detach().contiguous().cpu()
    _finite(values)
    shape = tuple(values.shape)
    if name == "none":
        return Packed(name, shape, (_part("values", values),))
    values = values.float()
    if name == "bf16":
        return Packed(name, shape, (_part("values", _bf16(values)),))
    if name == "int8":
        return Packed(name, shape, _int8(values))
    return Packed(name, shape, _lowrank(values, rank, _like(reference, shape)))


def decode(packed: Packed, reference: Tensor | None = None, *, largest: int = LARGEST) -> Tensor:
    """Undo ``encode``; the result has memory of its own.

    Parameters
    ----------
    packed : Packed
        From a peer: nothing in it is believed.
    reference : Tensor or None
        The same as when it was packed.
    largest : int
        Most values of the result.

    Returns
    -------
    Tensor
        (B, T, d), float32; for "none" of the type that was sent.

    Raises
    ------
    FedtuneError
        Unknown names, sizes that do not fit, values that are not finite, a missing reference.

    Examples
    --------
    >>> hidden = torch.tensor([[[1.0, -2.54, 127.0]]])
    >>> decode(encode(hidden, "int8"))
    tensor([[[  1.,  -3., 127.]]])
    """
    shape = packed.shape
    if packed.codec not in CODECS:
        raise _refuse(f"codec '{packed.codec}'", f"one of {', '.join(CODECS)}")
    if len(shape) != 3 or min(shape) < 1 or math.prod(shape) > largest:
        raise _refuse(f"a tensor of shape {shape} at the cut", f"at most {largest} values")
    if packed.codec == "none":
        dtype = packed.parts[0].dtype if len(packed.parts) == 1 else ""
        if dtype not in _TORCH:
            raise _refuse(f"values of type '{dtype}' at the cut", f"one of {', '.join(_TORCH)}")
        found = _read(packed, [("values", dtype, shape)])[0]
    elif packed.codec == "bf16":
        found = _read(packed, [("values", "bfloat16", shape)])[0].float()
    elif packed.codec == "int8":
        found = _from_int8(packed)
    else:
        found = _from_lowrank(packed, reference)
    _finite(found)
    return found


def bytes_of(name: Codec, shape: Shape, *, rank: int = 8, reference: bool = False) -> int:
    """Return how many bytes ``encode`` makes of a float32 tensor of shape (B, T, d).

    Examples
    --------
    >>> [bytes_of(name, (16, 128, 2048)) for name in CODECS]
    [16777216, 8388608, 4202496, 688128]
    """
    batch, length, width = shape
    values = batch * length * width
    kept = min(rank, length, width)
    mean = 0 if reference else 4 * batch * width
    return {
        "none": 4 * values,
        "bf16": 2 * values,
        "int8": values + 4 * batch * length,
        "lowrank": 2 * batch * kept * (length + width) + mean,
    }[name]


def nbytes(packed: Packed) -> int:
    """Return the bytes of all parts, without names and shapes."""
    return sum(_WIDTH[part.dtype] * math.prod(part.shape) for part in packed.parts)


def relative_error(before: Tensor, after: Tensor) -> float:
    """Return ||before - after|| / ||before||, L2 over all values; 0 where both are zero.

    Examples
    --------
    >>> relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    0.1
    """
    whole = float(torch.linalg.vector_norm(before.double()))
    error = float(torch.linalg.vector_norm(before.double() - after.double()))
    if whole == 0:
        return 0.0 if error == 0 else math.inf
    return error / whole


# ---------------------------------------------------------------- codecs


def _bf16(values: Tensor) -> Tensor:
    rounded = values.to(torch.bfloat16)
    _finite(rounded)  # the largest float32 values round to infinity
    return rounded


def _int8(values: Tensor) -> tuple[Part, Part]:
    scales = values.abs().amax(dim=2, keepdim=True) / 127
    _finite(scales * 127)
    # a row so small that its scale is 0 becomes zero, and never 0 / 0
    steps = torch.where(scales > 0, values / scales, 0.0)
    whole = steps.round_().clamp_(-127, 127).to(torch.int8)
    return _part("values", whole), _part("scales", scales.squeeze(2))


def _from_int8(packed: Packed) -> Tensor:
    wanted = [("values", "int8", packed.shape), ("scales", "float32", packed.shape[:2])]
    whole, scales = _read(packed, wanted)
    _finite(scales)
    if bool((scales < 0).any()):
        raise _refuse("a negative scale at the cut")
    return whole.float().mul_(scales[:, :, None])


def _lowrank(values: Tensor, rank: int, reference: Tensor | None) -> tuple[Part, ...]:
    if isinstance(rank, bool) or rank < 1:
        raise _refuse(f"tuning.split.rank={rank!r}", "at least 1")
    kept = min(rank, *values.shape[1:])
    mean = values.mean(dim=1)
    rest = values - (mean[:, None] if reference is None else reference)
    _finite(rest)
    left, sizes, right = torch.linalg.svd(rest, full_matrices=False)
    parts = (
        _part("left", _bf16(left[:, :, :kept] * sizes[:, None, :kept])),
        _part("right", _bf16(right[:, :kept])),
    )
    return parts if reference is not None else (*parts, _part("mean", mean))


def _from_lowrank(packed: Packed, reference: Tensor | None) -> Tensor:
    batch, length, width = packed.shape
    rank = packed.parts[0].shape[-1] if packed.parts and packed.parts[0].shape else 0
    if not 1 <= rank <= min(length, width):
        raise _refuse(f"rank {rank} of a ({length}, {width}) matrix at the cut")
    wanted: list[tuple[str, str, Shape]] = [
        ("left", "bfloat16", (batch, length, rank)),
        ("right", "bfloat16", (batch, rank, width)),
    ]
    has_mean = len(packed.parts) == 3
    if has_mean:
        wanted.append(("mean", "float32", (batch, width)))
    left, right, *mean = _read(packed, wanted)
    held = _like(reference, packed.shape)
    if has_mean:
        held = mean[0][:, None]
    if held is None:
        raise _refuse("a residual at the cut, and nothing held that it belongs to")
    return torch.bmm(left.float(), right.float()).add_(held)


# ---------------------------------------------------------------- bytes


def _part(name: str, values: Tensor) -> Part:
    values = values.contiguous()
    dtype = str(values.dtype).removeprefix("torch.")
    raw: NDArray[Any] = (values.view(_RAW[dtype]) if dtype in _RAW else values).numpy()
    return Part(name, dtype, tuple(values.shape), raw.data.cast("B"))


def _read(packed: Packed, wanted: list[tuple[str, str, Shape]]) -> list[Tensor]:
    found = [(part.name, part.dtype, tuple(part.shape)) for part in packed.parts]
    if found != wanted:
        raise _refuse(f"'{packed.codec}' parts {found} at the cut", f"wanted {wanted}")
    return [_tensor(part) for part in packed.parts]


def _tensor(part: Part) -> Tensor:
    size = _WIDTH[part.dtype] * math.prod(part.shape)
    if len(part.data) != size:
        raise _refuse(f"{len(part.data)} bytes for '{part.name}' at the cut", f"wanted {size}")
    raw: NDArray[np.int8] = np.frombuffer(part.data, dtype=np.int8)
    dtype = torch.int8 if part.dtype == "int8" else _TORCH[part.dtype]
    # a copy: what came in may be read-only, and is not ours to change
    return torch.from_numpy(raw.copy()).view(dtype).reshape(part.shape)


def _like(reference: Tensor | None, shape: Shape) -> Tensor | None:
    if reference is None:
        return None
    if tuple(reference.shape) != shape:
        raise _refuse(f"a reference of shape {tuple(reference.shape)}", f"wanted {shape}")
    return reference.detach().float().cpu()


def _finite(values: Tensor) -> None:
    least, most = torch.aminmax(values)  # both are NaN where any value is
    if not (math.isfinite(least) and math.isfinite(most)):
        raise _refuse("NaN or an infinity at the cut", "lower the rate, or clip the gradient")


def _refuse(what: str, hint: str = "the peer is broken or lies") -> FedtuneError:
    return FedtuneError(what, hint=hint, code=ExitCode.ENGINE)

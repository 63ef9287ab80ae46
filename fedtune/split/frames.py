"""Tensors as messages of bounded size, and back; what comes from a peer is checked first."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedtune.errors import FedtuneError
from fedtune.split import body_pb2 as pb
from fedtune.split.calls import Refused, Status
from fedtune.split.codec import Codec, Packed, Part, decode, encode
from fedtune.split.rows import Positions, Rows

__all__ = [
    "CODEC_NUMBERS",
    "Received",
    "Sealed",
    "frames",
    "header_of",
    "payload",
    "rows_from",
    "rows_to",
    "seal",
    "size_of",
    "unseal",
]

CODEC_NUMBERS: dict[Codec, pb.Codec] = {
    "none": pb.NONE, "bf16": pb.BF16, "int8": pb.INT8_TOKENS, "lowrank": pb.LOW_RANK,
}  # fmt: skip
_CODECS: dict[int, Codec] = {number: name for name, number in CODEC_NUMBERS.items()}
_PIECES: dict[Codec, tuple[str, ...]] = {
    "none": ("values",), "bf16": ("values",), "int8": ("values", "scales"),
    "lowrank": ("left", "right", "mean"),
}  # fmt: skip
_DTYPES: dict[str, pb.DType] = {
    "float32": pb.FLOAT32, "bfloat16": pb.BFLOAT16, "float16": pb.FLOAT16, "int8": pb.INT8,
}  # fmt: skip
_NAMES = {number: name for name, number in _DTYPES.items()}
_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FROM_TORCH = {dtype: name for name, dtype in _TORCH.items()}
_POSITIONS: dict[Positions, pb.Positions] = {
    "count": pb.COUNT, "mask-0": pb.MASK_0, "mask-1": pb.MASK_1,
}  # fmt: skip
_KINDS: tuple[Positions, ...] = tuple(_POSITIONS)


@dataclass(frozen=True)
class Sealed:
    """A tensor ready to travel: what is said about it, and its bytes, in pieces."""

    info: pb.Tensor
    data: tuple[memoryview, ...]


@dataclass(frozen=True)
class Received:
    """A message: its header, and what each tensor's bytes are."""

    header: pb.Header
    data: Mapping[int, tuple[pb.Tensor, memoryview]]

    def digest(self, name: pb.TensorName) -> bytes:
        """Return the SHA-256 of a tensor as it travelled, empty if it did not."""
        return self.data[name][0].sha256 if name in self.data else b""


def seal(name: pb.TensorName, tensor: torch.Tensor, codec: Codec = "none", rank: int = 8) -> Sealed:
    """Return a tensor as its bytes; with "none" nothing is copied.

    Raises
    ------
    FedtuneError
        The codec cannot take it: NaN, an infinity, a shape.
    """
    if codec == "none":
        parts: tuple[Part, ...] = (_raw(tensor),)
    else:
        parts = encode(tensor, codec, rank=rank).parts
    hashed = hashlib.sha256()
    data = tuple(memoryview(part.data).cast("B") for part in parts)
    for view in data:
        hashed.update(view)
    info = pb.Tensor(
        name=name, codec=CODEC_NUMBERS[codec], shape=tensor.shape, sha256=hashed.digest(),
        pieces=[pb.Piece(dtype=_DTYPES[part.dtype], shape=part.shape) for part in parts],
    )  # fmt: skip
    return Sealed(info, data)


def unseal(info: pb.Tensor, data: memoryview) -> torch.Tensor:
    """Return the tensor of bytes that arrived; it may share their memory.

    Raises
    ------
    Refused
        DATA_LOSS for another checksum, INVALID_ARGUMENT for NaN, infinities and
        shapes that do not fit.
    """
    if hashlib.sha256(data).digest() != info.sha256:
        raise Refused(Status.DATA_LOSS, f"{_called(info)} is not what was sent")
    codec = _CODECS.get(info.codec)
    if codec is None or len(info.pieces) != len(_PIECES[codec]):
        raise Refused(Status.INVALID_ARGUMENT, f"{_called(info)} has an unknown codec")
    parts, at = [], 0
    for name, piece in zip(_PIECES[codec], info.pieces, strict=True):
        size = _bytes_of(piece)
        dtype = _NAMES[piece.dtype]
        parts.append(Part(name, dtype, tuple(piece.shape), data[at : at + size]))
        at += size
    shape = tuple(info.shape)
    if codec == "none":
        return _plain(info, parts[0], shape)
    try:
        return decode(Packed(codec, shape, tuple(parts)))
    except FedtuneError as error:
        raise Refused(Status.INVALID_ARGUMENT, str(error), error.hint) from error


def size_of(info: pb.Tensor) -> int:
    """Return how many bytes a tensor is said to have, or refuse what is said."""
    return sum(_bytes_of(piece) for piece in info.pieces)


def frames(header: pb.Header, tensors: Iterable[Sealed], chunk_bytes: int) -> Iterator[pb.Chunk]:
    """Yield a message: a header that names the tensors, with their bytes in its chunks."""
    sent = list(tensors)
    head = pb.Header()
    head.CopyFrom(header)
    head.tensors.extend(one.info for one in sent)
    views = [view for one in sent for view in one.data if len(view)]
    first = pb.Chunk(header=head)
    if sum(len(view) for view in views) + head.ByteSize() <= chunk_bytes:
        first.data = b"".join(views)
        views = []
    yield first
    for view in views:
        for at in range(0, len(view), chunk_bytes):
            yield pb.Chunk(data=bytes(view[at : at + chunk_bytes]))


def header_of(chunks: Iterator[pb.Chunk]) -> pb.Chunk:
    """Return the first chunk of a message, with its header; the rest stays in ``chunks``."""
    first = next(chunks, None)
    if first is None or not first.HasField("header"):
        raise Refused(Status.INVALID_ARGUMENT, "a message without a header")
    return first


def payload(first: pb.Chunk, chunks: Iterable[pb.Chunk], chunk_bytes: int) -> Received:
    """Collect the bytes that the header promised; neither fewer nor more are taken."""
    header = first.header
    found: dict[int, tuple[pb.Tensor, memoryview]] = {}
    for info in header.tensors:
        if info.name in found or info.name == pb.TENSOR_NAME_UNSPECIFIED:
            raise Refused(Status.INVALID_ARGUMENT, f"{_called(info)} twice, or without a name")
        # Aligned as torch aligns: kernels may round otherwise elsewhere.
        memory = torch.empty(size_of(info), dtype=torch.uint8)
        found[info.name] = (info, memory.numpy().data)
    room = [view for _, view in found.values() if len(view)]
    total = sum(len(view) for view in room)
    at = came = 0
    for chunk in _all(first, chunks):
        data = memoryview(chunk.data)
        came += len(data)
        if len(data) > chunk_bytes or came > total:
            raise Refused(Status.OUT_OF_RANGE, f"{came} bytes came where {total} were named")
        while data:
            size = min(len(data), len(room[0]) - at)
            room[0][at : at + size] = data[:size]
            data, at = data[size:], at + size
            if at == len(room[0]):
                room, at = room[1:], 0
    if came != total:
        raise Refused(Status.INVALID_ARGUMENT, f"{came} bytes of {total} came")
    return Received(header, found)


def rows_to(rows: Rows) -> pb.Rows:
    """Return the lengths of a batch as they travel."""
    spans = rows.spans or ()
    return pb.Rows(
        batch=rows.batch, length=rows.length, past=rows.past, masked=rows.spans is not None,
        starts=[start for start, _ in spans], ends=[end for _, end in spans],
        positions=_POSITIONS[rows.positions],
        examples=rows.examples or (), fresh=rows.fresh,
    )  # fmt: skip


def rows_from(rows: pb.Rows, positions: int) -> Rows:
    """Return lengths that have travelled; at most ``positions`` to a row.

    Raises
    ------
    Refused
        They do not fit together.
    """
    if rows.past + rows.length > positions:
        raise Refused(
            Status.OUT_OF_RANGE, f"rows of {rows.past + rows.length} positions",
            f"at most {positions}",
        )  # fmt: skip
    if len(rows.starts) != len(rows.ends) or (rows.starts and not rows.masked):
        raise Refused(Status.INVALID_ARGUMENT, "rows whose beginnings and ends do not match")
    if rows.positions >= len(_KINDS):
        raise Refused(Status.INVALID_ARGUMENT, f"positions={rows.positions} is not known")
    spans = tuple(zip(rows.starts, rows.ends, strict=True)) if rows.masked else None
    try:
        return Rows(
            rows.batch, rows.length, rows.past, spans, _KINDS[rows.positions],
            tuple(rows.examples) or None, rows.fresh,
        )  # fmt: skip
    except ValueError as error:
        raise Refused(Status.INVALID_ARGUMENT, str(error)) from error


def _all(first: pb.Chunk, chunks: Iterable[pb.Chunk]) -> Iterator[pb.Chunk]:
    yield first
    for chunk in chunks:
        if chunk.HasField("header"):
            raise Refused(Status.INVALID_ARGUMENT, "a second header in one message")
        yield chunk


def _raw(tensor: torch.Tensor) -> Part:
    values = tensor.detach().contiguous().cpu()
    dtype = _FROM_TORCH.get(values.dtype)
    if dtype is None:
        raise Refused(Status.INVALID_ARGUMENT, f"a tensor of {values.dtype} at the cut")
    if values.numel() == 0:
        return Part("values", dtype, tuple(values.shape), b"")
    view = values.reshape(-1).view(torch.uint8).numpy().data
    return Part("values", dtype, tuple(values.shape), view)


def _plain(info: pb.Tensor, part: Part, shape: tuple[int, ...]) -> torch.Tensor:
    if part.shape != shape or part.dtype not in _TORCH:
        raise Refused(Status.INVALID_ARGUMENT, f"{_called(info)} of shape {shape} as {part.dtype}")
    if not len(part.data):
        return torch.empty(shape, dtype=_TORCH[part.dtype])
    flat = torch.from_numpy(np.frombuffer(part.data, np.uint8)).view(_TORCH[part.dtype])
    least, most = torch.aminmax(flat)
    if not math.isfinite(float(least)) or not math.isfinite(float(most)):
        raise Refused(
            Status.INVALID_ARGUMENT, f"{_called(info)} has values that are not finite",
            "the model has diverged: lower the learning rate",
        )  # fmt: skip
    return flat.reshape(shape)


def _bytes_of(piece: pb.Piece) -> int:
    if piece.dtype not in _NAMES or len(piece.shape) > 8:
        raise Refused(Status.INVALID_ARGUMENT, f"dtype {piece.dtype} is not one of the cut's")
    return math.prod(piece.shape) * _WIDTH[_NAMES[piece.dtype]]


def _called(info: pb.Tensor) -> str:
    known = info.name in pb.TensorName.values()
    return pb.TensorName.Name(info.name) if known else f"tensor {info.name}"

"""What travels: typed records around one safetensors blob.

Nothing here can carry code: scalars have fixed names and types, tensors are
safetensors in one Flower ``Array``. ``size_of`` counts the bytes of the encoded
message, so that what is reported is what the wire carries.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as _load_tensors
from safetensors.numpy import save as _save_tensors

from fedtune.adapters import Tensors
from fedtune.errors import ExitCode, FedtuneError
from fedtune.measure import Counts

__all__ = [
    "BUDGET",
    "DEALT",
    "KINDS",
    "REVEALED",
    "WITHHELD",
    "Accepted",
    "Advert",
    "Dealt",
    "Evaluation",
    "Hello",
    "Revealed",
    "Share",
    "Signed",
    "Task",
    "Terms",
    "Update",
    "from_record",
    "pack_tensors",
    "size_of",
    "to_record",
    "unpack_tensors",
]

WITHHELD = -1.0
"""Stands for a figure that stays with the client: no loss is negative."""

BUDGET = "budget exhausted"
"""Begins the reason of a client whose own ledger refuses."""

REVEALED = "this round's update left under masks once"
"""Begins the reason of a client that will not add the same update to another sum."""

DEALT = "secure/"
"""Begins the names of the tensors in a task that are shares, not parameters."""

_FIELDS, _TENSORS = "fields", "tensors"
_OPTIONAL = frozenset({"cut_up", "cut_down", "kept"})
"""Fields that do not travel while they are 0."""
_STYPE = "safetensors"
_INLINE = 32 * 1024
_CHUNK = 5 * 1024 * 1024
_MOST_SHAPES = 1024
_around: dict[tuple[object, ...], int] = {}


@dataclass(frozen=True)
class Hello:
    """Who a client is: its answer to ``query.hello``.

    ``epochs`` is how many folded seed pools it remembers, where only coefficients travel.
    """

    client: str
    rows: int
    fingerprint: str
    epochs: int = 0


@dataclass(frozen=True)
class Task:
    """What the server asks of a client in one round.

    Attributes
    ----------
    committed : int
        Last round that the server will never take back; older client state may go.
    lr : float
        Learning rate of this round.
    tensors : Tensors
        Trainable parameters by name, and the residual under ``residual/``.
    job : str
        The run. A client's ledger charges each round of a job once.
    """

    round: int
    attempt: int
    committed: int
    lr: float
    tensors: Tensors
    job: str = ""


@dataclass(frozen=True)
class Update:
    """What a client gives back after training.

    Attributes
    ----------
    examples : int
        Examples in one pass over the client's data: its weight.
    loss : float
        Mean training loss; ``WITHHELD`` where a privacy promise covers the data.
    tensors : Tensors
        New parameters minus those of the task, same names and shapes.
    cut_up, cut_down : int
        Split tuning: bytes to and from the body, besides this message.
    kept : int
        Split tuning: examples that crossed the cut.
    """

    round: int
    attempt: int
    examples: int
    steps: int
    truncated: int
    loss: float
    tensors: Tensors
    cut_up: int = 0
    cut_down: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Counts of one client's held-out evaluation; the confusion matrix is a tensor."""

    round: int
    loss: float
    units: int
    correct: int
    examples: int
    tensors: dict[str, NDArray[np.int64]]

    def counts(self) -> Counts:
        """Return the sums as ``Counts``."""
        confusion = self.tensors.get("confusion", np.zeros((0, 0), dtype=np.int64))
        return Counts(self.loss, self.units, self.correct, self.examples, confusion)


@dataclass(frozen=True)
class Share:
    """A client's part of the pool's key: ``share`` is 32 bytes, uint8."""

    tensors: dict[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class Terms:
    """What a server proposes to a node before anything else: ``query.terms``.

    ``terms`` is the experiment as ``fedtune.terms`` writes it, ``roster`` the signed list of
    who is enrolled, as bytes (uint8).
    """

    job: str
    terms: str
    fingerprint: str
    tensors: dict[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class Accepted:
    """A node's word that its owner's policy allows the terms of this digest."""

    client: str
    digest: str


@dataclass(frozen=True)
class Advert:
    """Secure aggregation, step 1: one attempt's public keys, signed; ``job`` is asked for."""

    round: int
    attempt: int
    tensors: dict[str, NDArray[Any]]
    job: str = ""


@dataclass(frozen=True)
class Dealt:
    """Step 2: encrypted shares for the neighbours."""

    round: int
    attempt: int
    tensors: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Signed:
    """Step 4: a survivor's signature of who survived; step 3 is a masked ``Update``."""

    round: int
    attempt: int
    tensors: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Revealed:
    """Step 5: what takes the masks off the sum, and off nothing else."""

    round: int
    attempt: int
    tensors: dict[str, NDArray[Any]]


KINDS: Mapping[type, str] = {
    Hello: "query.hello",
    Share: "query.share",
    Update: "train",
    Evaluation: "evaluate",
    Accepted: "query.terms",
    Advert: "query.advert",
    Dealt: "query.deal",
    Signed: "query.sign",
    Revealed: "query.reveal",
}
"""The type of the Flower message that asks for each record."""

_TYPES: dict[str, type] = {"int": int, "float": float, "str": str}
Record = (
    Hello | Task | Update | Evaluation | Share | Terms | Accepted | Advert | Dealt | Signed
    | Revealed
)  # fmt: skip
_Record = TypeVar(
    "_Record", Hello, Task, Update, Evaluation, Share, Terms, Accepted, Advert, Dealt, Signed,
    Revealed,
)  # fmt: skip


def pack_tensors(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """Encode named arrays as safetensors."""
    return _save_tensors({name: np.ascontiguousarray(value) for name, value in tensors.items()})


def unpack_tensors(blob: bytes) -> dict[str, NDArray[Any]]:
    """Decode safetensors; a broken blob is a ``FedtuneError``."""
    try:
        # safetensors gives names in any order; whoever adds up must not notice.
        return dict(sorted(_load_tensors(blob).items()))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise FedtuneError(f"tensors cannot be read: {error}", code=ExitCode.ENGINE) from error


def to_record(value: Record) -> RecordDict:
    """Encode one of the records."""
    scalars = {f.name: getattr(value, f.name) for f in fields(value) if f.name != _TENSORS}
    scalars = {name: one for name, one in scalars.items() if one or name not in _OPTIONAL}
    tensors = getattr(value, _TENSORS, None)
    blob = b"" if tensors is None else pack_tensors(tensors)
    if 0 < len(blob) <= _INLINE:
        # Objects of their own cost 450 bytes: much beside a few coefficients.
        return RecordDict({_FIELDS: ConfigRecord(scalars | {_TENSORS: blob})})
    record = RecordDict({_FIELDS: ConfigRecord(scalars)})
    if blob:
        array = Array(dtype="uint8", shape=(len(blob),), stype=_STYPE, data=blob)
        record[_TENSORS] = ArrayRecord({"blob": array})
    return record


def from_record(kind: type[_Record], record: RecordDict) -> _Record:
    """Decode and check a record: exactly the fields of ``kind``, each of its type, finite.

    Raises
    ------
    FedtuneError
        A field is missing, unknown, of another type, or not finite.
    """
    scalars: ConfigRecord | None = record.config_records.get(_FIELDS)
    if scalars is None:
        raise FedtuneError(f"{kind.__name__}: no fields", code=ExitCode.ENGINE)
    wanted = {f.name: str(f.type) for f in fields(kind)}
    if extra := set(record) - {_FIELDS} - ({_TENSORS} & wanted.keys()):
        raise FedtuneError(
            f"{kind.__name__}: unknown records {sorted(extra)[:5]}", code=ExitCode.ENGINE
        )
    values: dict[str, Any] = dict(scalars)
    inline = values.pop(_TENSORS, None) if _TENSORS in wanted else None
    absent = (wanted.keys() & _OPTIONAL) - values.keys()
    if any(values.get(name) == 0 for name in _OPTIONAL):
        raise FedtuneError(
            f"{kind.__name__}: a field that is 0 does not travel", code=ExitCode.ENGINE
        )
    values |= dict.fromkeys(absent, 0)
    if wanted.keys() - {_TENSORS} != values.keys():
        odd = sorted((wanted.keys() - {_TENSORS}) ^ values.keys())
        raise FedtuneError(f"{kind.__name__}: wrong fields {odd[:5]}", code=ExitCode.ENGINE)
    for name, found in values.items():
        if type(found) is not _TYPES[wanted[name]]:
            raise FedtuneError(
                f"{kind.__name__}.{name} is {type(found).__name__}, not {wanted[name]}",
                code=ExitCode.ENGINE,
            )
        if isinstance(found, float) and not math.isfinite(found):
            raise FedtuneError(f"{kind.__name__}.{name} = {found}", code=ExitCode.ENGINE)
    if _TENSORS in wanted:
        values[_TENSORS] = unpack_tensors(_blob(kind.__name__, record, inline))
    return kind(**values)


def size_of(message: Message) -> int:
    """Return the bytes of a message as Flower encodes it: every object of its tree.

    Blobs are neither copied nor hashed: only their length counts. What is around
    them is encoded once for each shape of message and remembered.
    """
    if not message.has_content():
        return len(message.deflate())
    if message.content.metric_records:
        return _tree_size(message) + sum(map(_chunks_size, _blob_lengths(message)))
    key = (_shape(message), _digits(message))
    if key not in _around:
        if len(_around) >= _MOST_SHAPES:
            _around.clear()
        _around[key] = _tree_size(message)
    return _around[key] + sum(map(_chunks_size, _blob_lengths(message)))


def _blob(kind: str, record: RecordDict, inline: object) -> bytes:
    if isinstance(inline, bytes) and _TENSORS not in record:
        return inline
    arrays = record.array_records.get(_TENSORS)
    if (
        inline is not None
        or arrays is None
        or list(arrays) != ["blob"]
        or arrays["blob"].stype != _STYPE
    ):
        raise FedtuneError(f"{kind}: no tensors in safetensors form", code=ExitCode.ENGINE)
    return arrays["blob"].data


def _shape(message: Message) -> tuple[object, ...]:
    """Return what the size of a message depends on, besides its blobs."""
    meta = message.metadata
    scalars = tuple(
        (name, key, _length(value))
        for name, record in message.content.config_records.items()
        for key, value in record.items()
    )
    names = tuple((name, *record) for name, record in message.content.array_records.items())
    nodes = (_length(meta.src_node_id), _length(meta.dst_node_id))
    return (
        meta.message_type,
        len(meta.group_id),
        len(meta.reply_to_message_id),
        nodes,
        scalars,
        names,
    )


def _length(value: object) -> object:
    """Return what the encoded length of a scalar depends on."""
    if isinstance(value, int):
        return value < 0, value.bit_length()
    if isinstance(value, str):
        return len(value.encode())
    return len(value) if isinstance(value, bytes | list) else type(value)


def _digits(message: Message) -> tuple[int, ...]:
    return tuple(len(str(length)) for length in _blob_lengths(message))


def _blob_lengths(message: Message) -> list[int]:
    records = message.content.array_records.values()
    return [len(array.data) for record in records for array in record.values()]


def _tree_size(message: Message) -> int:
    """Encode the message with empty blobs and add up its objects."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    record = message.content
    hollow = RecordDict({**record.config_records, **record.metric_records})
    for name, arrays in record.array_records.items():
        light = {key: Array(a.dtype, a.shape, a.stype, b"") for key, a in arrays.items()}
        hollow[name] = ArrayRecord(light)
    twin = copy.copy(message)
    twin.content = hollow
    return sum(len(part.deflate()) for part in get_all_nested_objects(twin).values())


def _chunks_size(length: int) -> int:
    """Bytes of the chunk objects of a blob, and of their ids in the array's header."""
    total = 0
    for index, start in enumerate(range(0, length, _CHUNK)):
        part = min(_CHUNK, length - start)
        first = index == 0
        total += len(f"ArrayChunk  {part}") + 1 + part
        total += 64 + (0 if first else 1) + len(str(index) if first else f", {index}")
    return total

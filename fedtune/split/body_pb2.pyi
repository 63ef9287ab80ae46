from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Part(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PART_UNSPECIFIED: _ClassVar[Part]
    FORWARD: _ClassVar[Part]
    BACKWARD: _ClassVar[Part]
    GO_ON: _ClassVar[Part]

class TensorName(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TENSOR_NAME_UNSPECIFIED: _ClassVar[TensorName]
    HIDDEN: _ClassVar[TensorName]
    GRAD: _ClassVar[TensorName]
    DEEP: _ClassVar[TensorName]
    OUTPUT: _ClassVar[TensorName]
    FRESH: _ClassVar[TensorName]
    REST: _ClassVar[TensorName]

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    INT8: _ClassVar[DType]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NONE: _ClassVar[Codec]
    BF16: _ClassVar[Codec]
    INT8_TOKENS: _ClassVar[Codec]
    LOW_RANK: _ClassVar[Codec]

class Positions(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COUNT: _ClassVar[Positions]
    MASK_0: _ClassVar[Positions]
    MASK_1: _ClassVar[Positions]

class Release(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EACH: _ClassVar[Release]
    ONCE: _ClassVar[Release]

PART_UNSPECIFIED: Part
FORWARD: Part
BACKWARD: Part
GO_ON: Part
TENSOR_NAME_UNSPECIFIED: TensorName
HIDDEN: TensorName
GRAD: TensorName
DEEP: TensorName
OUTPUT: TensorName
FRESH: TensorName
REST: TensorName
DTYPE_UNSPECIFIED: DType
FLOAT32: DType
BFLOAT16: DType
FLOAT16: DType
INT8: DType
NONE: Codec
BF16: Codec
INT8_TOKENS: Codec
LOW_RANK: Codec
COUNT: Positions
MASK_0: Positions
MASK_1: Positions
EACH: Release
ONCE: Release

class Cut(_message.Message):
    __slots__ = ("head", "tail", "count")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    head: int
    tail: int
    count: int
    def __init__(
        self, head: _Optional[int] = ..., tail: _Optional[int] = ..., count: _Optional[int] = ...
    ) -> None: ...

class Rows(_message.Message):
    __slots__ = (
        "batch",
        "length",
        "past",
        "masked",
        "starts",
        "ends",
        "positions",
        "examples",
        "fresh",
    )
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    PAST_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    batch: int
    length: int
    past: int
    masked: bool
    starts: _containers.RepeatedScalarFieldContainer[int]
    ends: _containers.RepeatedScalarFieldContainer[int]
    positions: Positions
    examples: _containers.RepeatedScalarFieldContainer[int]
    fresh: int
    def __init__(
        self,
        batch: _Optional[int] = ...,
        length: _Optional[int] = ...,
        past: _Optional[int] = ...,
        masked: bool = ...,
        starts: _Optional[_Iterable[int]] = ...,
        ends: _Optional[_Iterable[int]] = ...,
        positions: _Optional[_Union[Positions, str]] = ...,
        examples: _Optional[_Iterable[int]] = ...,
        fresh: _Optional[int] = ...,
    ) -> None: ...

class Piece(_message.Message):
    __slots__ = ("dtype", "shape")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(
        self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ...
    ) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "codec", "shape", "pieces", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: TensorName
    codec: Codec
    shape: _containers.RepeatedScalarFieldContainer[int]
    pieces: _containers.RepeatedCompositeFieldContainer[Piece]
    sha256: bytes
    def __init__(
        self,
        name: _Optional[_Union[TensorName, str]] = ...,
        codec: _Optional[_Union[Codec, str]] = ...,
        shape: _Optional[_Iterable[int]] = ...,
        pieces: _Optional[_Iterable[_Union[Piece, _Mapping]]] = ...,
        sha256: _Optional[bytes] = ...,
    ) -> None: ...

class Header(_message.Message):
    __slots__ = (
        "run",
        "client",
        "step",
        "part",
        "model",
        "cut",
        "rows",
        "tensors",
        "codec",
        "rank",
        "keep",
        "release",
        "key",
    )
    RUN_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    run: str
    client: str
    step: str
    part: Part
    model: str
    cut: Cut
    rows: Rows
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    codec: Codec
    rank: int
    keep: bool
    release: Release
    key: bytes
    def __init__(
        self,
        run: _Optional[str] = ...,
        client: _Optional[str] = ...,
        step: _Optional[str] = ...,
        part: _Optional[_Union[Part, str]] = ...,
        model: _Optional[str] = ...,
        cut: _Optional[_Union[Cut, _Mapping]] = ...,
        rows: _Optional[_Union[Rows, _Mapping]] = ...,
        tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...,
        codec: _Optional[_Union[Codec, str]] = ...,
        rank: _Optional[int] = ...,
        keep: bool = ...,
        release: _Optional[_Union[Release, str]] = ...,
        key: _Optional[bytes] = ...,
    ) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: Header
    data: bytes
    def __init__(
        self, header: _Optional[_Union[Header, _Mapping]] = ..., data: _Optional[bytes] = ...
    ) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("run", "client", "model", "cut", "codec", "release")
    RUN_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    run: str
    client: str
    model: str
    cut: Cut
    codec: Codec
    release: Release
    def __init__(
        self,
        run: _Optional[str] = ...,
        client: _Optional[str] = ...,
        model: _Optional[str] = ...,
        cut: _Optional[_Union[Cut, _Mapping]] = ...,
        codec: _Optional[_Union[Codec, str]] = ...,
        release: _Optional[_Union[Release, str]] = ...,
    ) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ("chunk_bytes", "tensor_bytes", "credits", "keep_seconds")
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    KEEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    chunk_bytes: int
    tensor_bytes: int
    credits: int
    keep_seconds: int
    def __init__(
        self,
        chunk_bytes: _Optional[int] = ...,
        tensor_bytes: _Optional[int] = ...,
        credits: _Optional[int] = ...,
        keep_seconds: _Optional[int] = ...,
    ) -> None: ...

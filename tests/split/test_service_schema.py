"""The messages cannot carry tokens, labels or text; and what is sent has none of them."""

from __future__ import annotations

import copy
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from fedtune.client.remote import connect, keep_ends
from fedtune.config import ModelConfig
from fedtune.models import load_base
from fedtune.server import body_server
from fedtune.server.body import Body
from fedtune.server.body_server import Door
from fedtune.server.body_service import BodyService
from fedtune.split import body_pb2 as pb
from fedtune.split.blocks import cut_of
from tests.split import service_kit as kit

ALLOWED = """
Cut.count:uint32 Cut.head:uint32 Cut.tail:uint32
Rows.batch:uint32 Rows.length:uint32 Rows.past:uint32 Rows.masked:bool Rows.starts:uint32*
Rows.ends:uint32* Rows.positions:enum Rows.examples:fixed64* Rows.fresh:uint32
Piece.dtype:enum Piece.shape:uint32*
Tensor.name:enum Tensor.codec:enum Tensor.shape:uint32* Tensor.pieces:message* Tensor.sha256:bytes
Header.run:string Header.client:string Header.step:string Header.part:enum Header.model:string
Header.cut:message Header.rows:message Header.tensors:message* Header.codec:enum
Header.rank:uint32 Header.keep:bool Header.release:enum Header.key:bytes
Chunk.header:message Chunk.data:bytes
OpenRequest.run:string OpenRequest.client:string OpenRequest.model:string OpenRequest.cut:message
OpenRequest.codec:enum OpenRequest.release:enum
OpenReply.chunk_bytes:uint32 OpenReply.tensor_bytes:uint64 OpenReply.credits:uint32
OpenReply.keep_seconds:uint32
"""
TYPES = {
    FieldDescriptor.TYPE_UINT32: "uint32", FieldDescriptor.TYPE_UINT64: "uint64",
    FieldDescriptor.TYPE_FIXED64: "fixed64", FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_ENUM: "enum", FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_STRING: "string", FieldDescriptor.TYPE_MESSAGE: "message",
}  # fmt: skip


def _fields(message: Descriptor) -> Iterator[str]:
    for field in message.fields:
        many = "*" if field.is_repeated else ""
        yield f"{message.name}.{field.name}:{TYPES[field.type]}{many}"
    for inner in message.nested_types:
        yield from _fields(inner)


def test_the_schema_has_these_fields_and_no_others() -> None:
    messages = pb.DESCRIPTOR.message_types_by_name.values()
    found = {field for message in messages for field in _fields(message)}
    assert found == set(ALLOWED.split())
    names = {value.name for value in pb.DESCRIPTOR.enum_types_by_name["TensorName"].values}
    assert names == {
        "TENSOR_NAME_UNSPECIFIED", "HIDDEN", "GRAD", "DEEP", "OUTPUT", "FRESH", "REST",
    }  # fmt: skip
    # Numbers in a tensor are floating point, but for the packed form of one.
    types = {value.name for value in pb.DESCRIPTOR.enum_types_by_name["DType"].values}
    assert types == {"DTYPE_UNSPECIFIED", "FLOAT32", "BFLOAT16", "FLOAT16", "INT8"}
    assert not pb.DESCRIPTOR.dependencies
    methods = pb.DESCRIPTOR.services_by_name["Body"].methods_by_name
    assert set(methods) == {"Open", "Forward", "Backward", "GoOn"}


def leaks(sent: bytes, numbers: Sequence[int], run: int = 4) -> list[str]:
    """Return in which forms some ``run`` numbers one after another are among the bytes."""
    forms = {
        "int16": "<h", "int32": "<i", "int64": "<q", "big int32": ">i", "float32": "<f",
        "float64": "<d", "float16": "<e",
    }  # fmt: skip
    found = []
    starts = [
        at for at in range(len(numbers) - run + 1) if len(set(numbers[at : at + run])) == run
    ]  # fmt: skip
    assert starts, "nothing to look for"
    words = {
        name: [struct.pack(form, number) for number in numbers] for name, form in forms.items()
    } | {"varint": [pb.Rows(ends=[number]).SerializeToString()[2:] for number in numbers]}
    for name, packed in words.items():
        if any(b"".join(packed[at : at + run]) in sent for at in starts):
            found.append(name)
    return found


TEXT = (
    "def admit(patient):\n    return patient.name == 'Margarete Vorderhaus'\n",
    "import secrets\nTOKEN = 'correct horse battery staple'\n",
)


def test_nothing_of_a_real_run_is_on_the_wire() -> None:
    base = load_base(ModelConfig())
    whole = copy.deepcopy(base.model)
    cut = cut_of(whole, 1, 1)
    model = copy.deepcopy(whole)
    keep_ends(model, cut)
    model.requires_grad_(True)
    recorded = kit.Recorded(BodyService(Body(whole, cut), kit.DIGEST))
    running = body_server.start(recorded, Door(), recorded.inner.limits)
    over = kit.open_link(running.address, kit.caller(cut=cut), kit.LinkSettings(patience=10))
    connect(model, over)
    encoded: Any = base.tokenizer(list(TEXT), return_tensors="pt", padding=True)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    for _ in range(2):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        made = model.generate(ids[:1, :8], max_new_tokens=4, do_sample=False)
    over.close()
    running.stop(0)

    sent = recorded.bytes
    assert {pb.FORWARD, pb.BACKWARD, pb.GO_ON} == set(recorded.parts)
    assert len(sent) > 5 * ids.numel() * recorded.inner.body.width * 4
    rows = [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
    targets = [[label for label in row if label >= 0] for row in labels.tolist()]
    for row in [*rows, *targets, made[0].tolist()]:
        assert leaks(sent, row) == []
    for word in itertools.chain(*(text.split() for text in TEXT)):
        assert len(word) < 4 or word.encode() not in sent

    # The search finds what it looks for, in each form.
    for form in ("h", "i", "q", "f", "d"):
        planted = sent[:1000] + struct.pack(f"<{len(rows[0])}{form}", *rows[0]) + sent[1000:]
        assert leaks(planted, rows[0])
    assert leaks(sent + pb.Rows(ends=rows[0]).SerializeToString(), rows[0]) == ["varint"]

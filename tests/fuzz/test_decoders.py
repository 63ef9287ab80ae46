"""Whatever a decoder of ours is given: a value or an error for people, in little time and memory.

``FEDTUNE_FUZZ=100000`` makes that many inputs for each test. Secure sums, rosters and keys have
tests of this kind beside their own (``privacy/test_secagg_fuzz.py``, ``keys/``).
"""

from __future__ import annotations

import copy
import json
import random
import struct
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from google.protobuf.message import DecodeError

from fedtune import wire
from fedtune.client.fleet_objects import inflate, plan
from fedtune.client.policy import judge, read_policy
from fedtune.errors import FedtuneError
from fedtune.keys.authority import make_authority
from fedtune.keys.node import line_of, new_identity, parse_line, public_of
from fedtune.keys.roster import decode, enrol
from fedtune.server.event_log import EVENTS
from fedtune.server.run_folder import create
from fedtune.server.snapshot import Seen, as_json, snapshot_of
from fedtune.terms import Own, accept
from tests.client.node_kit import BARE, EXAMPLE, experiment, told
from tests.client.test_fleet_attacks import Packed
from tests.fuzz.kit import INPUTS, ODD, bent, seed, tried

# What travels


def _value(kind: type[Any]) -> Any:
    """Return a right record of each kind, some larger than travels inside the fields."""
    given: dict[str, Any] = {}
    for one in fields(kind):
        given[one.name] = {"int": 3, "float": 0.5, "str": "ann"}.get(str(one.type))
        if given[one.name] is None:
            given[one.name] = {"a": np.arange(6, dtype=np.float32).reshape(2, 3),
                               "b": np.arange(12, dtype=np.uint8)}  # fmt: skip
    return kind(**given)


KINDS = [wire.Hello, wire.Task, wire.Update, wire.Evaluation, wire.Share, wire.Terms,
         wire.Accepted, wire.Advert, wire.Dealt, wire.Signed, wire.Revealed]  # fmt: skip
DTYPES = ["F32", "F64", "BF16", "F16", "I8", "U64", "BOOL", "F8_E4M3", "F4", "C64", "X", ""]


def _header(rng: random.Random, length: int) -> bytes:
    """Return safetensors whose header lies."""
    numbers = [0, 1, -1, 4, 24, length, length + 1, 2**31, 2**63, 2**64, 10**30]
    table = {
        rng.choice(["a", "b", "__metadata__", "", "x" * 200]): rng.choice([
            {"dtype": rng.choice(DTYPES),
             "shape": [rng.choice(numbers) for _ in range(rng.randint(0, 5))],
             "data_offsets": [rng.choice(numbers), rng.choice(numbers)]},
            rng.choice([0, None, [], "x", {"a": "b"}]),
        ])
        for _ in range(rng.randint(0, 3))
    }  # fmt: skip
    text = json.dumps(table).encode()
    said = rng.choice([len(text)] * 6 + [0, 1, 2**20, 2**31, 2**63, 2**64 - 1, len(text) + 9])
    return struct.pack("<Q", said) + text + rng.randbytes(length)


def _record(rng: random.Random, kind: type[Any]) -> tuple[RecordDict, int]:
    """Return a record with one thing wrong or more, and its size."""
    scalars = dict(wire.to_record(_value(kind)).config_records["fields"])
    blob = bytes(scalars.pop("tensors", b"")) or wire.pack_tensors({"a": np.zeros(3)})
    content: dict[str, Any] = {}
    how = rng.randint(0, 6)
    if how <= 1:
        blob = bent(rng, blob)
    elif how == 2:
        blob = _header(rng, rng.choice([0, 4, 24, 24, 100]))
    elif how == 3:
        name = rng.choice([*scalars, "tensors", "extra", "", "cut_up"])
        value = rng.choice(ODD)
        allowed = isinstance(value, int | float | str | bytes) and not isinstance(value, bool)
        try:
            scalars[name] = value if allowed else [rng.choice([1, 0.5, "x", b"x"])]
            ConfigRecord(scalars)
        except (TypeError, ValueError):
            scalars[name] = 7
    elif how == 4 and scalars:
        del scalars[rng.choice(list(scalars))]
    elif how == 5:
        content[rng.choice(["x", "tensors", "fields2", ""])] = rng.choice(
            [ConfigRecord({"a": 1}), ArrayRecord({"a": Array("uint8", (1,), "numpy", b"x")})]
        )
    if rng.random() < 0.5:
        scalars.setdefault("tensors", blob)
    else:
        names = rng.choice([["blob"]] * 5 + [["x"], ["blob", "x"], []])
        stype = rng.choice(["safetensors"] * 5 + ["pickle", "numpy.ndarray"])
        shape = (len(blob),)
        content["tensors"] = ArrayRecord(
            {name: Array("uint8", shape, stype, blob) for name in names}
        )
    if rng.random() < 0.97:
        content["fields"] = ConfigRecord(scalars)
    return RecordDict(content), len(blob) + sum(len(str(v)) for v in scalars.values())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_any_record_is_read_or_refused(kind: type[Any]) -> None:
    rng, refused = seed(kind.__name__), 0
    assert wire.from_record(kind, wire.to_record(_value(kind))) is not None
    for _ in range(INPUTS):
        record, size = _record(rng, kind)
        found = tried(lambda: wire.from_record(kind, record), size)  # noqa: B023 - at once
        refused += isinstance(found, FedtuneError)
        if isinstance(found, kind) and hasattr(found, "tensors"):
            assert sum(value.nbytes for value in found.tensors.values()) <= size
    assert refused > INPUTS // 3


def test_a_blob_that_says_it_is_huge_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of exabytes, a tensor of exabytes, and one named a million times."""
    huge = {"a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 4]}}
    zero = {"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}
    many = {f"a{n}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in range(1000)}
    monkeypatch.setattr("tests.fuzz.kit.WEIGHED", 1)
    for table in (huge, zero, many):
        text = json.dumps(table).encode()
        blob = struct.pack("<Q", len(text)) + text + bytes(4)
        tried(lambda: wire.unpack_tensors(blob), len(blob))  # noqa: B023 - at once
    for length in (2**63, 2**40, 100_000_001):
        blob = struct.pack("<Q", length) + b"{}"
        with pytest.raises(FedtuneError):
            wire.unpack_tensors(blob)


# What a server proposes

OWN = Own("ann", "/data/notes.jsonl", "notes", "/data/ledger.db")
TERMS = told(experiment(privacy__example=EXAMPLE | {"noise_multiplier": 4.0}))


def _places(table: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in table.items():
        found.append((*prefix, name))
        if isinstance(value, dict):
            found += _places(value, (*prefix, name))
    return found


PLACES = _places(TERMS)


def _terms(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return bent(rng, json.dumps(TERMS).encode()).decode("utf-8", "surrogateescape")
    table = json.loads(json.dumps(TERMS))
    for _ in range(rng.randint(1, 3)):
        *tables, last = rng.choice(PLACES)
        here = table
        for name in tables:
            here = here.get(name) if isinstance(here, dict) else None
        if not isinstance(here, dict):
            continue
        value = copy.deepcopy(rng.choice([*ODD, rng.random(), rng.randint(-5, 10**6)]))
        if isinstance(value, bytes):
            continue
        match rng.randint(0, 5):
            case 0:
                here.pop(last, None)
            case 1:
                here[rng.choice([last + "x", "source", "ledger", "device", "", "__class__"])] = (
                    value
                )
            case _:
                here[last] = value
    return json.dumps(table)


def test_any_terms_are_read_or_refused() -> None:
    """And what is read is judged; what the owner sets stays the owner's."""
    rng, refused, taken, longest = seed("terms"), 0, 0, 0
    for _ in range(INPUTS):
        text = _terms(rng)
        began = time.monotonic()
        try:
            config = accept(text, OWN)
            assert (config.data.source, config.privacy.ledger) == (OWN.source, OWN.ledger)
            assert (config.privacy.dataset, config.model.device) == (OWN.dataset, OWN.device)
            assert (config.engine.body, config.data.eval) == ("local", "")
            taken += judge(BARE, config) == ()
        except FedtuneError as error:
            refused += 1
            longest = max(longest, len(str(error)) - len(text))
        # Noise for a bound is searched for; everything else is at once.
        assert time.monotonic() - began < 60
    assert refused > INPUTS // 4
    assert taken > 0
    assert longest < 20_000


def test_deep_and_long_terms_are_refused_at_once() -> None:
    for text in ("[" * 200_000, '{"a":' * 40_000, "1" * 250_000, '"' + "\\u0000" * 40_000 + '"',
                 " " * (256 * 1024 + 1), "\ud800", "", "null", "[]", "{}", "NaN"):  # fmt: skip
        assert isinstance(tried(lambda: accept(text, OWN), len(text)), FedtuneError)  # noqa: B023


# What an owner writes

POLICY = b"""
max_epsilon = 3.0
max_delta = 1e-6
promises = ["example", "client"]
methods = ["backprop"]
hours = ["19:00-07:00"]
models = ["fedtune:tiny"]
[data]
text = "note"
"""


def test_any_policy_is_read_or_refused(tmp_path: Path) -> None:
    rng, file = seed("policy"), tmp_path / "owner.toml"
    refused = 0
    for _ in range(INPUTS):
        data = bent(rng, POLICY, (b"inf", b"nan", b"= [", b"[data]\n", b"= -1\n", b"= 1e400\n"))
        file.write_bytes(data)
        found = tried(lambda: read_policy(file), len(data))
        refused += isinstance(found, FedtuneError)
        if not isinstance(found, FedtuneError):
            assert 0 < found.max_epsilon < float("inf")
            assert 0 < found.max_delta < 1
    assert refused > INPUTS // 3


# Keys and rosters


def test_any_roster_or_line_is_read_or_refused(tmp_path: Path) -> None:
    make_authority(tmp_path / "keys", "test")
    ann = public_of(new_identity("ann"))
    roster = enrol(tmp_path / "keys", ann)
    good, line = (tmp_path / "keys" / "roster").read_bytes(), line_of(ann)
    ca_pem, rng = (tmp_path / "keys" / "ca.pem").read_bytes(), seed("roster")
    for _ in range(INPUTS):
        data = bent(rng, good)
        found = tried(lambda: decode(data, ca_pem), len(data))  # noqa: B023 - at once
        assert isinstance(found, FedtuneError) or (found == roster and data == good)
        text = bent(rng, line.encode()).decode("utf-8", "replace")
        said = tried(lambda: parse_line(text), len(text))  # noqa: B023 - at once
        assert isinstance(said, FedtuneError) or line_of(said) == text


# Messages of Flower


def test_any_message_of_flower_is_put_together_or_refused() -> None:
    rng, limit = seed("flower"), 100_000
    blob = ArrayRecord({"blob": Array("uint8", (300,), "safetensors", bytes(300))})
    whole = Packed(RecordDict({"fields": ConfigRecord({"a": 1, "b": "x"}), "tensors": blob}))
    wanted = plan(whole.tree)
    refused = 0
    for _ in range(INPUTS):
        contents = dict(whole.objects)
        name = rng.choice(list(contents))
        contents[name] = bent(rng, contents[name], (b"[[", b"-1,", b"arraychunk_ids")) or b"\0"
        size = sum(map(len, contents.values()))
        found = tried(lambda: inflate(whole.name, contents, wanted, limit), size)  # noqa: B023
        refused += isinstance(found, FedtuneError)
        tree = type(whole.tree)()
        try:
            tree.ParseFromString(bent(rng, whole.tree.SerializeToString()))
        except (DecodeError, UnicodeDecodeError):
            continue
        tried(lambda: plan(tree), size)  # noqa: B023 - at once
    assert refused > INPUTS // 2


# What a status page reads


def test_any_log_of_a_run_is_shown(tmp_path: Path) -> None:
    """Lines that a full disk, or a client's words, left in a run folder."""
    output = {"folder": str(tmp_path)}
    config = experiment(privacy__example=None, output=output, federation__rounds=9)
    folder, rng = create(config, "x"), seed("events")
    right = [
        {"event": "round_started", "time": 1.0, "round": 3, "attempt": 1, "cohort": 5},
        {"event": "client_done", "time": 2.0, "round": 3, "client": "ann", "outcome": "failed",
         "reason": "x", "bytes_up": 3},
        {"event": "round_done", "time": 3.0, "round": 3, "row": {"round": 3, "loss": 1.0}},
        {"event": "lost", "time": 4.0, "lines": 7},
        {"round": 3, "client": "ann", "outcome": "ok", "reason": "", "bytes_up": 1},
        {"round": 2, "loss": 1.5, "seconds": 3.0, "bytes_up": 4, "bytes_down": 5},
    ]  # fmt: skip
    lines = []
    for _ in range(INPUTS):
        line = rng.choice(right)
        value = rng.choice(ODD)
        if rng.random() < 0.5 and not isinstance(value, bytes):
            lines.append(json.dumps(line | {rng.choice(list(line)): value}).encode())
        else:
            lines.append(bent(rng, json.dumps(line).encode()).replace(b"\n", b" "))
    for start in range(0, len(lines), 50):
        for name in (EVENTS, "clients.jsonl", "metrics.jsonl"):
            some = lines[start : start + 50]
            rng.shuffle(some)
            if name == "metrics.jsonl":  # nobody else's words are in it: cut short, no more
                some = [json.dumps(right[-1]).encode()[: rng.randint(1, 99)] for _ in some]
            (folder.path / name).write_bytes(b"\n".join(some) + b"\n")
        size = 3 * sum(map(len, lines[start : start + 50]))
        snapshot = tried(lambda: snapshot_of(folder, seen=Seen(), now=5.0), size)
        assert not isinstance(snapshot, FedtuneError)
        json.dumps(as_json(snapshot), allow_nan=False)


# What crosses the cut

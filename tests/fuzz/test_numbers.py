"""Frames of a split model, states of a policy and updates: a value or an error for people."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from fedtune import wire
from fedtune.config_privacy import RldpConfig
from fedtune.errors import FedtuneError
from fedtune.privacy.rldp.controller import ACTIONS, STATES, settings_of
from fedtune.privacy.rldp.sac import Sac
from fedtune.privacy.rldp.transitions import packed
from fedtune.privacy.rldp.travel import actor_of, require_actor, require_transitions
from fedtune.privacy.summing import summing
from fedtune.split import body_pb2 as pb
from fedtune.split.calls import Refused, Status
from fedtune.split.frames import (
    frames,
    header_of,
    payload,
    rows_from,
    rows_to,
    seal,
    size_of,
    unseal,
)
from fedtune.split.rows import Rows
from tests.fuzz.kit import INPUTS, bent, seed, tried


def test_any_frames_are_read_or_refused() -> None:
    import torch

    rng, limit, refused = seed("frames"), 1 << 20, 0
    tensors = [seal(pb.HIDDEN, torch.randn(2, 3, 4), codec)
               for codec in ("none", "bf16", "int8", "lowrank")]  # fmt: skip
    right = [chunk.SerializeToString()
             for one in tensors for chunk in frames(pb.Header(), [one], 1000)]  # fmt: skip
    spans = rows_to(Rows(2, 3, 0, ((0, 3), (1, 3)))).SerializeToString()

    def read(data: bytes) -> None:
        chunk = pb.Chunk.FromString(data)
        first = header_of(iter([chunk]))
        if sum(map(size_of, first.header.tensors)) > limit:
            raise Refused(Status.OUT_OF_RANGE, "larger than any call: its callers say so first")
        for info, view in payload(first, iter(()), limit).data.values():
            unseal(info, view)

    errors = (FedtuneError, Refused, DecodeError, UnicodeDecodeError)
    for data in right:
        assert tried(lambda: read(data), len(data), errors) is None  # noqa: B023 - at once
    for _ in range(INPUTS):
        data = bent(rng, rng.choice(right))
        refused += tried(lambda: read(data), len(data) + limit, errors) is not None  # noqa: B023
        text = bent(rng, spans)
        tried(lambda: rows_from(pb.Rows.FromString(text), 512), len(text), errors)  # noqa: B023
    assert refused > INPUTS // 2


# What a shared clipping policy is told, and tells


def _spoilt(rng: random.Random, good: Mapping[str, Any]) -> dict[str, Any]:
    """Change one array or one name: another size, type or number."""
    found: dict[str, Any] = {name: value.copy() for name, value in good.items()}
    name = rng.choice(list(found))
    value = found[name]
    match rng.randint(0, 5):
        case 0:
            odd = [np.nan, np.inf, 1e30, -3.0, 0.0] if value.dtype.kind == "f" else [-1, 0, 2**62]
            value.flat[rng.randrange(value.size)] = rng.choice(odd)
        case 1:
            found[name] = value.astype(rng.choice(["f8", "f2", "i4", "u1", "?", "i8", "f4"]))
        case 2:
            found[name] = np.resize(
                value, tuple(rng.choices([0, 1, 2, 9, 30], k=rng.randint(0, 3)))
            )
        case 3:
            found[rng.choice(["", "policy/", "state", "actor.9", "é"])] = found.pop(name)
        case 4:
            found["more"] = np.zeros(rng.choice([0, 1, 5000]), "f4")
        case _:
            found = {one: np.repeat(rows, 5, axis=0) for one, rows in found.items()}
    return found


def test_any_policy_or_transitions_are_taken_or_refused() -> None:
    rng, settings = seed("shared policy"), RldpConfig(mode="federated")
    actor = actor_of(Sac(STATES, ACTIONS, settings_of(settings), 1).actor_state())
    made = {name: np.zeros((2, *value.shape[1:]), "f4") for name, value in packed([]).items()}
    taken = refused = 0
    for number in range(INPUTS):
        good, require = (
            (actor, lambda found: require_actor(found, settings)) if number % 2
            else (made, lambda found: require_transitions(found, 4))
        )  # fmt: skip
        blob = wire.pack_tensors(_spoilt(rng, good))
        if rng.random() < 0.3:
            blob = bent(rng, blob)
        found = tried(lambda: require(wire.unpack_tensors(blob)), len(blob))  # noqa: B023 - at once
        if isinstance(found, FedtuneError):
            refused += 1
        else:
            taken += 1
            for one in found or ():
                numbers = (*one.state, *one.action, one.reward, *one.next_state)
                assert len(numbers) == 2 * STATES + ACTIONS + 1
                assert all(-1.0 <= value <= 1.0 for value in numbers)
    assert refused > INPUTS // 2
    assert taken > 0


# What is added


def test_any_update_is_flattened_or_refused() -> None:
    rng = seed("summing")
    how = summing({"a": (3, 2), "b": (4,)}, 3, 1.0)
    dtypes = ["f4", "f8", "f2", "i4", "u1", "?", "c8", "U3", "S4", "V8", "O", "M8[s]"]
    for _ in range(INPUTS):
        update: dict[str, Any] = {"a": np.ones((3, 2), "f4"), "b": np.ones(4, "f4")}
        name = rng.choice(["a", "b", "c", ""])
        shape = tuple(rng.choice([0, 1, 2, 3, 4]) for _ in range(rng.randint(0, 3)))
        shape = rng.choice([shape, (3, 2), (4,)])
        value = np.zeros(shape, rng.choice(dtypes))
        if value.dtype.kind == "f" and value.size:
            value.flat[0] = rng.choice([np.nan, np.inf, 6e4, 5e-324, -0.0, 3.0])
        update[name] = value
        if rng.random() < 0.2:
            del update[rng.choice(list(update))]
        found = tried(lambda: how.flatten(update, None), 1000)  # noqa: B023 - at once
        if not isinstance(found, FedtuneError):
            assert found.dtype == np.int64
            assert int(np.abs(found).max()) <= how.most

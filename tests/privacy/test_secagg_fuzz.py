"""Whatever a decoder of secure sums is given: an error for people, or the very record.

``FEDTUNE_FUZZ=100000`` makes that many examples of each test.
"""

import os
import random
import tracemalloc
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.secagg import Collector, Member, Record
from tests.privacy.secagg_rounds import Sum, begin, twin

EXAMPLES = int(os.environ.get("FEDTUNE_FUZZ", "60"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 1000,
    database=None,
    suppress_health_check=list(HealthCheck),
)
MOST_BYTES = 1 << 20  # that refusing anything may take
FREE = {"take_deal": {"sealed"}, "add": {"values"}, "take_reveal": {"share"}}
"""What the collector cannot judge when it takes it."""
CODES = {ExitCode.ENGINE, ExitCode.SIGNATURE, ExitCode.PRIVACY, ExitCode.QUORUM}
NAME = "owner-1"

Party = Member | Collector
Decoder = Callable[[Any, object], object]


@cache
def _stages() -> dict[str, tuple[Party, Decoder, Record]]:
    """Return each decoder with a party that waits for it, and the record that it would take."""
    found: dict[str, tuple[Party, Decoder, Record]] = {}

    def note(step: str, party: Party, decoder: Decoder, record: Record) -> None:
        found[step] = twin(party), decoder, {name: np.array(v) for name, v in record.items()}

    one: Sum = begin(3)
    server, member, values = one.server, one.members[NAME], one.values[NAME]
    adverts = {name: party.advert() for name, party in one.members.items()}
    server.take_advert("owner-0", adverts["owner-0"])
    note("take_advert", server, lambda p, r: p.take_advert(NAME, r), adverts[NAME])
    for name in (NAME, "owner-2"):
        server.take_advert(name, adverts[name])
    cohort = server.cohort()
    note("deal", member, lambda p, r: p.deal(r), cohort)
    deals = {name: party.deal(cohort) for name, party in one.members.items()}
    note("take_deal", server, lambda p, r: p.take_deal(NAME, r), deals[NAME])
    for name, deal in deals.items():
        server.take_deal(name, deal)
    note("mask", member, lambda p, r: p.mask(values, r), server.dealt_for(NAME))
    masked = {
        name: party.mask(one.values[name], server.dealt_for(name))
        for name, party in one.members.items()
    }
    note("add", server, lambda p, r: p.add(NAME, r), masked[NAME])
    for name, vector in masked.items():
        server.add(name, vector)
    note("sign", member, lambda p, r: p.sign(r), server.survivors())
    signatures = {name: party.sign(server.survivors()) for name, party in one.members.items()}
    note("take_signature", server, lambda p, r: p.take_signature(NAME, r), signatures[NAME])
    for name, signature in signatures.items():
        server.take_signature(name, signature)
    note("reveal", member, lambda p, r: p.reveal(r), server.signed())
    shares = member.reveal(server.signed())
    note("take_reveal", server, lambda p, r: p.take_reveal(NAME, r), shares)
    return found


def _give(step: str, record: object) -> FedtuneError | None:
    """Give a record to a decoder; check what refusing it costs and leaves behind."""
    party, decoder, _ = _stages()[step]
    tried = twin(party)
    try:
        decoder(tried, record)
    except FedtuneError as caught:
        error = caught
    else:
        return None
    assert error.code in CODES
    assert error.hint
    assert 0 < len(str(error)) < 300
    if isinstance(tried, Member):
        assert tried.step == "closed"
    else:
        assert all(_equal(vars(tried)[name], value) for name, value in vars(party).items())
    return error


def _equal(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return one is other or one == other


def _same(step: str, record: object) -> bool:
    """Say whether a record is the right one, but for what a collector cannot judge."""
    right = _stages()[step][2]
    return (
        isinstance(record, dict)
        and record.keys() == right.keys()
        and all(
            type(record[name]) is np.ndarray
            and record[name].dtype == value.dtype
            and record[name].shape == value.shape
            and (name in FREE.get(step, ()) or np.array_equal(record[name], value))
            for name, value in right.items()
        )
    )


STEPS = ["take_advert", "deal", "take_deal", "mask", "add", "sign", "take_signature", "reveal",
         "take_reveal"]  # fmt: skip
DTYPES = ["u1", "<u4", ">u4", "<i8", "<f4", "c8", "?", "O", "U4", "S3", "V8", "M8[s]"]
ANY_ARRAY = st.builds(
    np.zeros,
    array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=70),
    st.sampled_from(DTYPES),
) | arrays(np.uint8, array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=70))
ANY_VALUE = st.one_of(
    ANY_ARRAY, st.none(), st.integers(), st.binary(max_size=80), st.text(max_size=5),
    st.lists(st.integers(0, 255), max_size=40), st.just(np.uint8(1)),
)  # fmt: skip


Pick = Callable[[Sequence[Any]], Any]
"""Takes one of several: by hypothesis, which can make a failure small, or at random, fast."""


def _mutation(pick: Pick, record: Record) -> object:
    """Change one thing about a record."""
    field = pick(sorted(record))
    value = record[field]
    kinds = ["drop", "rename", "extra", "any", "flip", "dtype", "reshape", "grow", "shrink",
             "swap", "fill", "fortran", "subclass", "order"]  # fmt: skip
    kind = pick(kinds)
    changed: dict[Any, Any] = {name: np.array(one) for name, one in record.items()}
    if kind == "drop":
        del changed[field]
    elif kind == "rename":
        changed[pick(["", "Name", field + " ", 7, None, b"name", *record])] = changed.pop(field)
    elif kind == "extra":
        changed[pick(["", "extra", *record])] = value
    elif kind == "any":
        shape = tuple(pick(range(70)) for _ in range(pick(range(4))))
        changed[field] = pick(
            [None, 1, b"", "x", [], {}, np.uint8(1), np.zeros(shape, pick(DTYPES))]
        )
    elif kind == "flip":
        flat = changed[field].view(np.uint8).reshape(-1)
        for _ in range(pick(range(1, 5))):
            flat[pick(range(flat.size))] ^= 1 << pick(range(8))
    elif kind == "dtype":
        changed[field] = value.astype(pick(["i1", "?", "u2", ">u4", "f4", "i8", "u8", "c8", "S1"]))
    elif kind == "reshape":
        shapes = [(-1,), (1, -1), (-1, 1), (1, *value.shape), (*value.shape, 1)]
        changed[field] = value.reshape(pick(shapes))
    elif kind == "grow":
        rows = pick([1, 2, 1022, 5000, 10**9])
        changed[field] = np.broadcast_to(value[:1], (len(value) + rows, *value.shape[1:]))
    elif kind == "shrink":
        changed[field] = value[: pick(range(len(value)))]
    elif kind == "swap":
        changed[field] = value[::-1]
    elif kind == "fill":
        changed[field] = np.full_like(value, pick([0, 1, 2, 127, 255]))
    elif kind == "fortran":
        changed[field] = np.asfortranarray(value)
    elif kind == "subclass":
        changed[field] = np.ma.masked_array(value)
    else:
        changed = dict(reversed(changed.items()))
    return changed


@pytest.mark.parametrize("step", STEPS)
@given(data=st.data())
@FUZZ
def test_v36_an_altered_record_is_refused_by(step: str, data: st.DataObject) -> None:
    record = _mutation(lambda some: data.draw(st.sampled_from(some)), _stages()[step][2])
    error = _give(step, record)
    assert (error is None) == _same(step, record)


@pytest.mark.parametrize("step", STEPS)
def test_v36_many_altered_records_are_refused_by(step: str) -> None:
    rng = random.Random(step if EXAMPLES < 1000 else None)
    right, taken = _stages()[step][2], 0
    for number in range(EXAMPLES):
        state = rng.getstate()
        record = _mutation(rng.choice, right)
        error = _give(step, record)
        assert (error is None) == _same(step, record), (number, state)
        taken += error is None
    assert taken < 0.9 * EXAMPLES


@pytest.mark.parametrize("step", STEPS)
@given(
    record=st.dictionaries(
        st.sampled_from(
            [
                "mask_key",
                "seal_key",
                "pledge",
                "least",
                "signature",
                "name",
                "sealed",
                "dealers",
                "values",
                "survivors",
                "signers",
                "share",
            ]
        )
        | st.text(max_size=6),
        ANY_VALUE,
        max_size=7,
    )
    | ANY_VALUE
)
@FUZZ
def test_anything_at_all_is_refused_by(step: str, record: object) -> None:
    assert _give(step, record) is not None


@pytest.mark.parametrize("step", STEPS)
def test_the_right_record_is_taken_by(step: str) -> None:
    assert _give(step, _stages()[step][2]) is None


@pytest.mark.parametrize("step", STEPS)
def test_refusing_a_record_of_a_terabyte_takes_no_memory(step: str) -> None:
    right = _stages()[step][2]
    for field, value in right.items():
        huge = np.broadcast_to(np.zeros(1, value.dtype), (1 << 20, 1 << 20))
        rows = np.broadcast_to(np.zeros(1, value.dtype), (1 << 34, *value.shape[1:]))
        for wrong in (huge, rows):
            tracemalloc.start()
            error = _give(step, {**right, field: wrong})
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert error is not None
            assert peak < MOST_BYTES

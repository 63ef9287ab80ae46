"""Masks, shares, neighbours and the numbers modulo 2^32: each alone, against what is known."""

import hashlib
import hmac
import itertools
import math
import random
import secrets

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy.stats import hypergeom

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy import secagg_mask
from fedtune.privacy.secagg import degree_of, from_field, tail_of, threshold_of, to_field
from fedtune.privacy.secagg_graph import (
    BROKEN_LOG2,
    COLLUDING,
    MISSING,
    REFUSED_LOG2,
    Graph,
    _local,
    broken_log2,
    graph_of,
)
from fedtune.privacy.secagg_mask import (
    AT_ONCE,
    CHUNK,
    MODES,
    add_masks,
    derive,
    faster,
    mask_key,
    seal_key,
)
from fedtune.privacy.secagg_shamir import PRIME, SHARE_BYTES, combine, split

# ---------------------------------------------------------------- masks


def _stream(key: bytes, length: int) -> NDArray[np.uint32]:
    """Return what AES-256 makes of 2, 3, 4, ...: the counter mode, written out."""
    blocks = -(-length // 4)
    counters = b"".join(at.to_bytes(16, "big") for at in range(2, blocks + 2))
    one_by_one = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return np.frombuffer(one_by_one.update(counters), "<u4")[:length]


@pytest.mark.parametrize("mode", sorted(MODES))
def test_v35_a_mask_is_the_known_answer_of_aes_256(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secagg_mask, "faster", lambda: mode)
    # the first block of 16 zeros under a key of zeros: test case 14 of the paper on GCM
    vector = np.zeros(4, np.uint32)
    add_masks(vector, [(bytes(32), False)])
    assert vector.astype("<u4").tobytes().hex() == "cea7403d4d606b6e074ec5d3baf39d18"
    # FIPS 197, C.3: another key of 256 bits, so that all of its bytes count
    key = bytes(range(32))
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    known = block.update(bytes.fromhex("00112233445566778899aabbccddeeff"))
    assert known.hex() == "8ea2b7ca516745bfeafc49904b496089"
    for length in (1, 3, 4, 1000, CHUNK // 4, CHUNK // 4 + 1, CHUNK // 2 + 77):
        vector = np.arange(length, dtype=np.uint32)
        add_masks(vector, [(key, False)])
        assert np.array_equal(vector, np.arange(length, dtype=np.uint32) + _stream(key, length))


def test_v35_both_ways_to_make_a_stream_make_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert faster() in MODES
    found = {}
    for mode in MODES:
        monkeypatch.setattr(secagg_mask, "faster", lambda mode=mode: mode)
        found[mode] = np.zeros(3 * CHUNK // 4 + 5, np.uint32)
        add_masks(found[mode], [(bytes(range(32)), False), (bytes(range(1, 33)), True)])
    assert np.array_equal(found["ctr"], found["gcm"])


def test_v35_every_bit_of_the_key_changes_the_mask() -> None:
    seen = set()
    for bit in range(256):
        key = (1 << bit).to_bytes(32, "big")
        vector = np.zeros(4, np.uint32)
        add_masks(vector, [(key, False)])
        seen.add(vector.tobytes())
    assert len(seen) == 256


@pytest.mark.parametrize("length", [0, 4, 16, 24, 31, 33])
def test_v35_a_key_of_another_length_is_refused(length: int) -> None:
    vector = np.zeros(4, np.uint32)
    with pytest.raises(FedtuneError, match="another length"):
        add_masks(vector, [(bytes(32), False), (bytes(length), False)])
    assert not vector.any()


def test_v35_a_pairs_key_is_what_the_standards_say() -> None:
    # RFC 7748, 6.1: both private keys, and the secret that they agree on
    ada = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
    bob = "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    one, two = (X25519PrivateKey.from_private_bytes(bytes.fromhex(key)) for key in (ada, bob))
    key = mask_key(one, two.public_key().public_bytes_raw(), b"salt", ("ada", "bob"))
    assert key == mask_key(two, one.public_key().public_bytes_raw(), b"salt", ("bob", "ada"))
    # RFC 5869 with one block, written out
    info = b"fedtune/mask/v1" + b"\x00\x03ada" + b"\x00\x03bob"
    extracted = hmac.digest(b"salt", bytes.fromhex(shared), hashlib.sha256)
    assert key == hmac.digest(extracted, info + b"\x01", hashlib.sha256)


def test_v36_keys_differ_by_pair_salt_purpose_and_direction() -> None:
    one, two = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    public = two.public_key().public_bytes_raw()
    keys = [
        mask_key(one, public, salt, names)
        for salt in (b"job/1/0", b"job/1/1", b"job/2/0")
        for names in (("a", "b"), ("a", "c"), ("ab", ""))
    ]
    keys += [seal_key(one, public, b"job/1/0", *names) for names in (("a", "b"), ("b", "a"))]
    keys.append(derive(bytes(32), b"job/1/0", "fedtune/self/v1", "a"))
    assert len(set(keys)) == len(keys) == 12
    assert {len(key) for key in keys} == {32}
    own = one.public_key().public_bytes_raw()
    assert mask_key(two, own, b"job/1/0", ("b", "a")) == keys[0]  # the other side's


def test_masks_cancel_for_any_number_of_streams() -> None:
    keys = [secrets.token_bytes(32) for _ in range(AT_ONCE + 3)]
    values = np.arange(1000, dtype=np.uint32)
    vector = values.copy()
    add_masks(vector, [(key, at % 2 == 0) for at, key in enumerate(keys)])
    slow = values.copy()
    for at, key in enumerate(keys):
        slow = slow - _stream(key, 1000) if at % 2 == 0 else slow + _stream(key, 1000)
    assert np.array_equal(vector, slow)
    add_masks(vector, [(key, at % 2 == 1) for at, key in enumerate(keys)])
    assert np.array_equal(vector, values)


def test_only_a_vector_that_can_be_changed_is_masked() -> None:
    frozen = np.zeros(4, np.uint32)
    frozen.flags.writeable = False
    for wrong in (np.zeros(4), np.zeros((2, 2), np.uint32), np.zeros(8, np.uint32)[::2], frozen):
        with pytest.raises(FedtuneError, match="in place"):
            add_masks(wrong, [(bytes(32), False)])


# ---------------------------------------------------------------- shares


def test_any_threshold_of_shares_give_the_secret() -> None:
    secret = secrets.token_bytes(32)
    shares = split(secret, 3, [2, 5, 7, 11, 1024])
    by_point = dict(zip([2, 5, 7, 11, 1024], shares, strict=True))
    for chosen in itertools.combinations(by_point, 3):
        assert combine({point: by_point[point] for point in chosen}) == secret
    assert all(len(share) == SHARE_BYTES for share in shares)


@pytest.mark.parametrize(("threshold", "members"), [(1, 1), (2, 2), (34, 50), (108, 161)])
def test_shares_at_the_sizes_in_use(threshold: int, members: int) -> None:
    for secret in (bytes(32), b"\xff" * 32, secrets.token_bytes(32)):
        points = random.Random(7).sample(range(1, 1025), members)
        shares = dict(zip(points, split(secret, threshold, points), strict=True))
        some = random.Random(8).sample(points, threshold)
        assert combine({point: shares[point] for point in some}) == secret


def test_shares_of_the_same_secret_are_new_each_time_and_cover_the_field() -> None:
    first, second = (split(bytes(32), 2, list(range(1, 200))) for _ in range(2))
    assert not set(first) & set(second)
    values = [int.from_bytes(share, "big") / PRIME for share in first + second]
    assert 0.4 < sum(value > 0.5 for value in values) / len(values) < 0.6


def test_fewer_shares_or_altered_ones_do_not_give_the_secret() -> None:
    secret = secrets.token_bytes(32)
    shares = dict(enumerate(split(secret, 4, [1, 2, 3, 4]), 1))
    for wrong in (
        {point: shares[point] for point in (1, 2, 3)},
        shares | {2: bytes(65) + b"\x01"},
        shares | {2: shares[3]},
        {point + 1: share for point, share in shares.items()},
        shares | {2: PRIME.to_bytes(66, "big")},
        shares | {2: b"\xff" * 66},
        shares | {2: b""},
        {},
    ):
        with pytest.raises(FedtuneError, match="give no secret"):
            combine(wrong)


def test_shares_that_make_no_sense_are_refused() -> None:
    for secret, threshold, points in (
        (bytes(31), 2, [1, 2]), (bytes(32), 3, [1, 2]), (bytes(32), 0, [1]),
        (bytes(32), 2, [1, 1]), (bytes(32), 2, [0, 1]),
    ):  # fmt: skip
        with pytest.raises(FedtuneError, match="shares of"):
            split(secret, threshold, points)


# ---------------------------------------------------------------- neighbours


@pytest.mark.parametrize("members", [2, 3, 50, 51, 60, 100, 300, 1000])
def test_neighbours_are_mutual_and_as_many_as_said(members: int) -> None:
    graph = graph_of(hashlib.sha256(b"x").digest(), members)
    around = [set(graph.around(member)) for member in range(members)]
    for member, near in enumerate(around):
        assert member in near
        assert len(near) == degree_of(members) + 1
        assert all(member in around[other] for other in near)
    assert degree_of(members) == members - 1 or members > 50
    assert graph.quorum == threshold_of(members)


def test_the_ring_is_another_one_for_each_cohort() -> None:
    rings = {graph_of(bytes([at]) * 32, 60).ring for at in range(50)}
    assert len(rings) == 50
    assert all(sorted(ring) == list(range(60)) for ring in rings)
    # each member comes to each place about equally often: 60 * 59 cells, chi-square
    counts = np.zeros((60, 60))
    for at in range(600):
        ring = graph_of(hashlib.sha256(at.to_bytes(4, "big")).digest(), 60).ring
        counts[np.arange(60), list(ring)] += 1
    statistic = ((counts - 10.0) ** 2 / 10.0).sum()
    assert abs(statistic - 59 * 59) / math.sqrt(2 * 59 * 59) < 5.0  # by chance 6e-7


def _parts(graph: Graph, alive: NDArray[np.bool_]) -> int:
    """Count the parts into which the alive fall apart."""
    left, parts = set(np.flatnonzero(alive).tolist()), 0
    while left:
        parts += 1
        todo = [left.pop()]
        while todo:
            near = left.intersection(graph.around(todo.pop()))
            left -= near
            todo += near
    return parts


def test_a_ring_parts_only_where_enough_collude_side_by_side() -> None:
    rng = np.random.default_rng(5)
    reach = 6
    threshold, gap = _local(reach, 2 / 3)
    assert (threshold, gap) == (9, 1)
    parted = held = 0
    for _ in range(1500):
        ring = tuple(rng.permutation(30).tolist())
        graph = Graph(30, ring, reach, gap, threshold, 1)
        present = np.ones(30, np.bool_)
        # a cheat leaves out, and bribes, neighbours: the rule must say what it takes
        start, other = rng.integers(30, size=2)
        spans = [ring[(first + at) % 30] for first in (start, other) for at in range(reach)]
        present[rng.choice(spans, rng.integers(0, 4), replace=False)] = False
        if not graph.holds(present):
            continue
        held += 1
        colluding = np.zeros(30, np.bool_)
        colluding[rng.choice(spans, rng.integers(3, 13), replace=False)] = True
        assert all(present[graph.around(member)].sum() >= threshold for member in range(30))
        if _parts(graph, present & ~colluding) > 1:
            parted += 1
            bad = colluding[list(ring)]
            windows = [sum(bad[(at + step) % 30] for step in range(reach)) for at in range(30)]
            assert max(windows) >= reach - gap
    assert held > 250
    assert parted > 10


def test_the_rule_counts_what_is_missing_in_every_window() -> None:
    rng = np.random.default_rng(6)
    graph = graph_of(bytes(32), 60)
    for _ in range(300):
        present = rng.random(60) > 0.25
        windows = [
            sum(not present[graph.ring[(at + step) % 60]] for step in range(graph.reach))
            for at in range(60)
        ]
        slow = max(windows) <= graph.gap and present.sum() >= graph.quorum
        assert graph.holds(present) == slow


@pytest.mark.parametrize("members", [51, 60, 100, 200, 500, 1000, 1024])
def test_the_failure_bounds_are_those_of_the_hypergeometric_distribution(members: int) -> None:
    reach = degree_of(members) // 2
    threshold, gap = _local(reach, 2 / 3)
    colluding = int(COLLUDING * members)
    parted = hypergeom(members - 1, colluding, reach).sf(reach - gap - 1)
    opened = hypergeom(members - 1, colluding, 2 * reach).sf(threshold - 1)
    bound = members * (parted + opened)
    assert bound <= 2.0**BROKEN_LOG2 * (1 + 1e-6)
    ours = broken_log2(members, reach)
    assert ours == pytest.approx(math.log2(bound), abs=1e-3) if bound > 0 else ours < -1000
    refused = members * hypergeom(members, int(MISSING * members), reach).sf(gap)
    assert refused <= 2.0**REFUSED_LOG2
    smaller = reach - 1
    _, less = _local(smaller, 2 / 3)
    worse = members * hypergeom(members, int(MISSING * members), smaller).sf(less)
    assert broken_log2(members, smaller) > BROKEN_LOG2 or worse > 2.0**REFUSED_LOG2


def test_a_graph_of_one_is_refused() -> None:
    with pytest.raises(FedtuneError, match="a cohort of 1"):
        graph_of(bytes(32), 1)


# ---------------------------------------------------------------- numbers modulo 2^32


@pytest.mark.parametrize("cohort", [1, 2, 50, 1000, 1024])
def test_v37_the_largest_admissible_sum_does_not_wrap(cohort: int) -> None:
    most = (2**31 - 1) // cohort
    for sign in (1, -1):
        field = to_field(np.array([sign * most, sign]), cohort, most)
        total = np.zeros(2, np.uint32)
        for _ in range(cohort):
            total += field
        assert from_field(total).tolist() == [sign * most * cohort, sign * cohort]
    with pytest.raises(FedtuneError, match="may wrap") as caught:
        to_field(np.array([0]), cohort, most + 1)
    assert caught.value.code == ExitCode.PRIVACY


def test_v37_beyond_the_range_a_sum_would_wrap_unseen() -> None:
    wrapped = np.array([2**30], np.uint32) + np.array([2**30], np.uint32)
    assert from_field(wrapped).tolist() == [-(2**31)]  # which is why the range is checked


def test_v37_a_number_beyond_what_was_agreed_is_refused_and_not_shown() -> None:
    low = np.iinfo(np.int64).min
    for step in (1001, -1001, 2**32 + 5, low, low + 1, 2**62):
        with pytest.raises(FedtuneError, match="beyond the agreed 1000 steps") as caught:
            to_field(np.array([3, step]), 10, 1000)
        assert str(step) not in str(caught.value) + caught.value.hint
    assert to_field(np.array([1000, -1000]), 10, 1000).dtype == np.uint32
    assert to_field(np.zeros((0,), np.int64), 10, 1000).shape == (0,)
    assert to_field(np.ones((2, 3), np.int64), 10, 1000).shape == (2, 3)


def test_v34_only_whole_numbers_are_summed() -> None:
    for wrong in (np.array([1.0]), np.array([1], np.int32), np.array([True])):
        with pytest.raises(FedtuneError, match="steps are"):
            to_field(wrong, 2, 10)
    with pytest.raises(FedtuneError, match="the sum is"):
        from_field(np.array([1]))


def test_v37_noise_stays_within_its_tail() -> None:
    rng = np.random.default_rng(1)
    # at 10 bits the union bound is still a bound: at most one run in 1024 goes beyond
    beyond = sum(
        bool((np.abs(np.rint(rng.normal(0, 50, 1000))) > tail_of(50.0, 1000, 10)).any())
        for _ in range(2000)
    )
    assert beyond <= 8  # expected at most 2; more than 8 by chance: 2e-4
    assert tail_of(0.0, 10) == 1
    assert tail_of(50.0, 1000, 40) > tail_of(50.0, 1000, 10)
    for scale, length, bits in ((-1.0, 1, 1), (math.nan, 1, 1), (1.0, 0, 1), (1.0, 1, 0)):
        with pytest.raises(FedtuneError, match="scale="):
            tail_of(scale, length, bits)

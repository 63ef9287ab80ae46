"""Secure sums are exact whoever drops out, as long as enough are left; else nothing comes."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import load, save

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.secagg import Context, Member, from_field, threshold_of, to_field
from fedtune.privacy.secagg_shamir import PRIME, _weights, combine
from tests.privacy.secagg_rounds import (
    STAGES,
    begin,
    context_of,
    names_of,
    play,
    roster_of,
    signer_of,
    twin,
)


def _check(members: int, stages: tuple[str, ...], **changes: float) -> bool:
    """Play one pattern of dropouts; say whether it was admissible."""
    one = begin(members, **changes)
    last = dict(zip(one.members, stages, strict=True))
    done = [sum(STAGES.index(stage) >= at for stage in stages) for at in range(len(STAGES))]
    if min(done[1:]) < threshold_of(members, one.context.share):
        with pytest.raises(FedtuneError) as caught:
            play(one, last)
        assert caught.value.code == ExitCode.QUORUM
        return False
    total = play(one, last)
    summed = [name for name, stage in last.items() if STAGES.index(stage) >= 2]
    assert np.array_equal(total, one.expected(summed))
    assert one.server.summed() == sorted(summed)
    return True


@pytest.mark.parametrize("members", [2, 3])
def test_every_pattern_of_dropouts_up_to_three_members(members: int) -> None:
    fine = [_check(members, stages) for stages in itertools.product(STAGES, repeat=members)]
    assert Counter(fine) == {2: {True: 1, False: 24}, 3: {True: 13, False: 112}}[members]


@pytest.mark.parametrize("members", [4, 5])
@pytest.mark.parametrize("stage", STAGES[:-1])
def test_every_subset_that_drops_out_at_a_step(members: int, stage: str) -> None:
    for gone in itertools.product([False, True], repeat=members):
        stages = tuple(stage if away else "reveal" for away in gone)
        admissible = members - sum(gone) >= threshold_of(members)
        assert _check(members, stages) == admissible


def test_every_admissible_pattern_of_four_and_five_over_all_steps() -> None:
    for members in (4, 5):  # with the default share one of them may go, at any step
        for at, stage in itertools.product(range(members), STAGES[:-1]):
            stages = ["reveal"] * members
            stages[at] = stage
            assert _check(members, tuple(stages))
    for first, second in itertools.product(STAGES[:-1], repeat=2):  # more than half: two of five
        assert _check(5, ("reveal", first, "reveal", second, "reveal"), share=0.55)


@pytest.mark.parametrize(("members", "times"), [(8, 15), (20, 3), (50, 1)])
def test_random_patterns_up_to_fifty_members(members: int, times: int) -> None:
    for seed in range(times):
        rng = random.Random(seed)
        stages = ["reveal"] * members
        most = members - threshold_of(members)
        for at in rng.sample(range(members), most if seed == 0 else rng.randint(0, most)):
            stages[at] = rng.choice(STAGES[:-1])
        assert _check(members, tuple(stages))


@pytest.mark.parametrize(("members", "missing"), [(60, 6), (100, 10)])
def test_on_the_ring_above_fifty_members(members: int, missing: int) -> None:
    rng = random.Random(members)
    stages = ["reveal"] * members
    for at in rng.sample(range(members), missing):
        stages[at] = rng.choice(STAGES[:-1])
    assert _check(members, tuple(stages))


def test_many_missing_side_by_side_on_the_ring_are_refused() -> None:
    one = begin(60)
    one.deal()
    graph, names = one.server._graph, one.server.members()
    away = [names[graph.ring[(50 + at) % 60]] for at in range(graph.gap + 1)]
    for name in one.server.dealers():
        dealt = one.server.dealt_for(name)
        if name not in away:
            one.server.add(name, one.members[name].mask(one.values[name], dealt))
    # the quorum is 40, and 53 are there: it is where they are missing
    with pytest.raises(FedtuneError, match=r"53 survivors of 60.*side by side") as caught:
        one.server.survivors()
    assert caught.value.code == ExitCode.QUORUM
    one.mask(away[:1])
    one.server.survivors()


def test_a_vector_of_several_chunks_and_values_as_they_were() -> None:
    one = begin(3, length=(1 << 17) + 3)
    before = {name: value.copy() for name, value in one.values.items()}
    total = play(one, {"owner-1": "deal"})
    assert np.array_equal(total, before["owner-0"] + before["owner-2"])
    assert all(np.array_equal(one.values[name], before[name]) for name in before)


def test_v34_the_order_of_arrival_does_not_change_a_bit() -> None:
    totals = []
    for seed in range(4):
        one = begin(5)
        one.deal()
        order = random.Random(seed).sample(one.server.dealers(), 5)
        one.mask(order)
        one.sign(reversed(order))
        one.reveal(order[1:])
        totals.append(one.server.total().tobytes())
    assert len(set(totals)) == 1


def test_signed_numbers_come_back() -> None:
    one = begin(3, length=4)
    steps = {name: np.array([-(10**6), 10**6, at, -at]) for at, name in enumerate(one.members)}
    one.values = {name: to_field(value, 3, 10**6) for name, value in steps.items()}
    assert from_field(play(one, {})).tolist() == [-3 * 10**6, 3 * 10**6, 3, -3]


def test_below_the_threshold_what_the_server_holds_fits_any_secret() -> None:
    one = begin(5)
    one.until("reveal")
    one.reveal(one.server.summed()[:3])  # four are needed
    with pytest.raises(FedtuneError, match="3 shares") as caught:
        one.server.total()
    assert caught.value.code == ExitCode.QUORUM
    assert not np.array_equal(one.server._sum, one.expected(one.members))
    shares = one.server._gathered(0)
    assert len(shares) == 3
    weights = _weights((*shares, 5))
    known = sum(
        weight * int.from_bytes(share, "big")
        for weight, share in zip(weights, shares.values(), strict=False)
    )
    for wish in (bytes(32), b"\xff" * 32, bytes(range(32))):
        missing = (int.from_bytes(wish, "big") - known) * pow(weights[-1], -1, PRIME) % PRIME
        assert combine({**shares, 5: missing.to_bytes(66, "big")}) == wish
    one.reveal(one.server.summed()[3:4])  # the fourth comes late: now it is enough
    assert np.array_equal(one.server.total(), one.expected(one.members))


def test_no_sum_is_there_before_the_last_step() -> None:
    one = begin(3)
    with pytest.raises(FedtuneError, match="takes adverts"):
        one.server.total()
    for step in ("join", "deal", "mask", "sign"):
        getattr(one, step)()
        ended = twin(one.server)
        with pytest.raises(FedtuneError, match=r"needed|asks for") as caught:
            ended.total()
        assert caught.value.code == ExitCode.QUORUM
    one.reveal()
    one.server.total()
    with pytest.raises(FedtuneError, match="done"):
        one.server.total()


@pytest.mark.parametrize("step", ["survivors", "signed", "summed", "dealt_for", "cohort"])
def test_what_goes_out_may_be_asked_for_again(step: str) -> None:
    one = begin(3)
    one.until({"dealt_for": "mask", "survivors": "sign", "signed": "reveal"}.get(step, "deal"))
    ask = getattr(one.server, step)
    arguments = ("owner-1",) if step == "dealt_for" else ()
    if step == "summed":
        one.deal()
    first, second = ask(*arguments), ask(*arguments)
    if step == "summed":
        assert first == second == []
        return
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_the_threshold_is_more_than_half_and_two_thirds() -> None:
    for members in range(2, 300):
        assert threshold_of(members, 0.5001) > members / 2
        exact = -(-2 * members // 3)
        assert threshold_of(members) == max(exact, members // 2 + 1)
        assert threshold_of(members, 1.0) == members


@pytest.mark.parametrize(
    "changes",
    [
        {"job": ""},
        {"job": "x" * 201},
        {"job": "\ud800"},
        {"round": -1},
        {"attempt": -1},
        {"model": b"short"},
        {"length": 0},
        {"length": 2**28 + 1},
        {"share": 0.5},
        {"share": 1.1},
        {"share": float("nan")},
        {"min_cohort": 1},
        {"min_survivors": 1},
        {"min_survivors": 1025},
    ],
)
def test_a_context_out_of_bounds_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(FedtuneError, match=next(iter(changes))) as caught:
        context_of(**changes)
    assert caught.value.code == ExitCode.CONFIG


def test_what_is_agreed_upon_is_in_the_digest_and_the_floors_are_not() -> None:
    base = context_of()
    agreed = [{"job": "a"}, {"round": 5}, {"attempt": 1}, {"model": bytes(32)}, {"length": 6},
              {"share": 0.7}]  # fmt: skip
    digests = {context_of(**change).digest() for change in agreed}
    assert len(digests | {base.digest()}) == 7
    assert context_of(min_cohort=9, min_survivors=8).digest() == base.digest()


def test_bytes_on_the_wire_are_as_documented() -> None:
    one = begin(names_of(10), length=1000)
    sizes = {}
    one.join()
    sizes["cohort"] = len(save(one.server.cohort()))
    one.deal()
    dealt = one.server.dealt_for("owner-3")
    sizes["dealt"] = len(save(dealt))
    masked = one.members["owner-3"].mask(one.values["owner-3"], load(save(dealt)))
    sizes["masked"] = len(save(masked))
    one.server.add("owner-3", load(save(masked)))
    header = 500
    assert 0 <= sizes["cohort"] - 232 * 10 < header
    assert 0 <= sizes["dealt"] - (148 * 9 + 10) < header
    assert 0 <= sizes["masked"] - (4000 + 64) < header


def test_a_member_must_be_enrolled_with_its_own_key() -> None:
    roster = roster_of(["a", "b"])
    for name, signer in (("c", signer_of("c")), ("a", signer_of("b"))):
        with pytest.raises(FedtuneError, match="not enrolled with this key") as caught:
            Member(context_of(), name, signer, roster)
        assert caught.value.code == ExitCode.SIGNATURE
    long = "x" * 65
    with pytest.raises(FedtuneError, match="name 'xxx"):
        Member(context_of(), long, signer_of(long), roster_of([long]))


def test_memory_of_the_server_does_not_grow_with_members() -> None:
    import tracemalloc

    one = begin(8, length=1 << 18)  # 1 MiB each
    one.deal()
    one.server.dealt_for("owner-0")
    tracemalloc.start()
    for name in one.server.dealers():
        masked = one.members[name].mask(one.values[name], one.server.dealt_for(name))
        one.server.add(name, masked)
        del masked
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1 << 18  # the sum was there before
    assert peak < 3 << 20  # one vector under its masks, and buffers


def test_the_names_of_types_are_there() -> None:
    assert repr(begin(2).server) == "Collector(taking adverts, 0 members)"
    assert isinstance(Context("j", 0, 0, bytes(32), 1), Context)

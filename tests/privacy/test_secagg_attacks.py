"""A server or a member that cheats at a secure sum learns nothing, and is told so."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedtune.errors import ExitCode
from fedtune.privacy.secagg import Collector, Member, Record
from tests.privacy.secagg_rounds import (
    altered,
    begin,
    context_of,
    knows_nothing,
    placed,
    refused,
    roster_of,
    signer_of,
    twin,
)


def _rows(record: Record, order: list[int]) -> Record:
    return {name: value[order] for name, value in record.items()}


# ---------------------------------------------------------------- the cohort


def test_v36_a_cohort_of_one_or_below_the_floor_isrefused() -> None:
    one = begin(1)
    one.server.take_advert("owner-0", one.members["owner-0"].advert())
    refused(one.server.cohort, "a cohort of 1, smaller than", ExitCode.QUORUM)

    three = begin(3, min_cohort=3)
    cohort = three.join()
    for rows in ([0], [0, 1]):
        member = twin(three.members["owner-0"])
        refused(
            lambda member=member, rows=rows: member.deal(_rows(cohort, rows)),
            f"a cohort of {len(rows)}, smaller than min_cohort=3", ExitCode.PRIVACY, member,
        )  # fmt: skip
    three.members["owner-0"].deal(cohort)


def test_an_owner_with_a_higher_floor_than_the_server_stays_out() -> None:
    one = begin(3)
    careful = Member(context_of(min_cohort=4), "owner-1", signer_of("owner-1"),
                     roster_of(one.members))  # fmt: skip
    one.members["owner-1"] = careful
    cohort = one.join()
    refused(lambda: careful.deal(cohort), "smaller than min_cohort=4", ExitCode.PRIVACY, careful)


def test_one_owners_floor_on_the_sum_is_kept_by_all() -> None:
    one = begin(5, share=0.55)  # three of five would do
    strict = Member(context_of(share=0.55, min_survivors=4), "owner-1", signer_of("owner-1"),
                    roster_of(one.members))  # fmt: skip
    one.members["owner-1"] = strict
    one.deal()
    one.mask(["owner-0", "owner-1", "owner-2"])
    refused(one.server.survivors, "3 survivors: somebody asks for at least 4", ExitCode.QUORUM)
    # a server that goes on all the same
    forged = {
        "survivors": np.array([1, 1, 1, 0, 0], np.uint8),
        "dealers": np.ones(5, np.uint8),
        "signature": np.stack([np.frombuffer(one.server._seen[at], np.uint8) for at in range(3)]),
    }
    for name in ("owner-0", "owner-1", "owner-2"):
        member = one.members[name]
        refused(lambda member=member: member.sign(forged), "at least 4", ExitCode.QUORUM, member)


def test_unknown_doubled_and_unsorted_members_arerefused() -> None:
    one = begin(["a", "b", "c"])
    stranger = Ed25519PrivateKey.generate()
    cohort = one.join()

    enrolled = roster_of(["a", "b"])
    member = Member(context_of(), "a", signer_of("a"), enrolled)
    known = placed(cohort, 0, member.advert())
    refused(lambda: member.deal(known), "'c' is not enrolled", ExitCode.SIGNATURE, member)

    for order, words in (([0, 0, 1], "there twice"), ([1, 0, 2], "not sorted")):
        member = twin(one.members["a"])
        refused(
            lambda member=member, order=order: member.deal(_rows(cohort, order)), words,
            ExitCode.ENGINE, member,
        )  # fmt: skip

    roster = roster_of(["a", "b", "c"])
    server = Collector(context_of(), roster)
    forged = Member(context_of(), "b", stranger, {**roster, "b": stranger.public_key()})
    advert = forged.advert()
    for name, words in (("b", "signature of 'b'"), ("zoe", "'zoe' is not enrolled")):
        refused(lambda name=name: server.take_advert(name, advert), words, ExitCode.SIGNATURE)


def test_one_owner_under_two_names_counts_once() -> None:
    signer = Ed25519PrivateKey.generate()
    roster = roster_of(["a", "b"]) | {"c": signer.public_key(), "d": signer.public_key()}
    context = context_of()
    members = [Member(context, name, signer, roster) for name in ("c", "d")]
    honest = [Member(context, name, signer_of(name), roster) for name in ("a", "b")]
    adverts = {"a": honest[0].advert(), "b": honest[1].advert()}
    adverts |= {"c": members[0].advert(), "d": members[1].advert()}
    server = Collector(context, roster)
    for name in ("a", "b", "c"):
        server.take_advert(name, adverts[name])
    refused(lambda: server.take_advert("d", adverts["d"]), "a key that another", ExitCode.SIGNATURE)
    cohort = server.cohort()
    both = {name: np.concatenate([value, value[2:]]) for name, value in cohort.items()}
    both["name"][3] = np.frombuffer(b"d".ljust(64, b"\0"), np.uint8)
    both = placed(both, 3, adverts["d"])
    refused(lambda: honest[0].deal(both), "'d' has a key that", ExitCode.SIGNATURE, honest[0])


@pytest.mark.parametrize("field", ["mask_key", "seal_key", "pledge", "least"])
def test_a_server_that_swaps_a_public_key_is_found_out(field: str) -> None:
    one = begin(3)
    cohort = one.join()
    forged = {name: value.copy() for name, value in cohort.items()}
    mine = X25519PrivateKey.generate().public_key().public_bytes_raw()
    forged[field][1] = 3 if field == "least" else np.frombuffer(mine, np.uint8)
    for name, words in (("owner-0", "signature of 'owner-1'"), ("owner-1", "another advert of")):
        member = one.members[name]
        refused(lambda member=member: member.deal(forged), words, ExitCode.SIGNATURE, member)


@pytest.mark.parametrize(
    "other", [{"round": 3}, {"attempt": 1}, {"job": "jab"}, {"model": bytes(32)}, {"length": 6},
              {"share": 0.75}],
)  # fmt: skip
def test_v36_an_advert_of_another_round_attempt_job_or_model_isrefused(
    other: dict[str, object],
) -> None:
    one = begin(3)
    roster = roster_of(one.members)
    elsewhere = Member(context_of(**other), "owner-2", signer_of("owner-2"), roster)
    replayed = elsewhere.advert()
    refused(
        lambda: one.server.take_advert("owner-2", replayed), "'owner-2' is not over",
        ExitCode.SIGNATURE,
    )  # fmt: skip
    forged = placed(one.join(), 2, replayed)
    member = one.members["owner-0"]
    refused(lambda: member.deal(forged), "'owner-2' is not over", ExitCode.SIGNATURE, member)


def test_a_key_that_gives_everybody_the_same_secret_isrefused() -> None:
    roster = roster_of(["a", "b"])
    context = context_of()
    bad = Member(context, "b", signer_of("b"), roster)
    bad.advert()
    for field in ("seal_key", "mask_key"):
        honest = Member(context, "a", signer_of("a"), roster)
        advert = bad._advert
        keys = {"mask_key": advert.mask_key, "seal_key": advert.seal_key} | {field: bytes(32)}
        weak = type(advert)(**keys, pledge=advert.pledge, least=2, signature=b"")
        signature = signer_of("b").sign(weak.signed(context.digest(), "b"))
        weak = type(advert)(**keys, pledge=advert.pledge, least=2, signature=signature)
        server = Collector(context, roster)
        server.take_advert("a", honest.advert())
        server.take_advert("b", weak.record())
        if field == "seal_key":
            refused(
                lambda honest=honest, server=server: honest.deal(server.cohort()),
                "'a' and 'b' cannot agree", ExitCode.SIGNATURE, honest,
            )  # fmt: skip
        else:
            server.take_deal("a", honest.deal(server.cohort()))
            other = twin(bad)
            other._advert = weak
            server.take_deal("b", other.deal(server.cohort()))
            refused(
                lambda honest=honest, server=server: honest.mask(
                    np.zeros(5, np.uint32), server.dealt_for("a")
                ),
                "'a' and 'b' cannot agree", ExitCode.SIGNATURE, honest,
            )  # fmt: skip
            assert not honest.exposed


def test_each_step_once_and_in_order() -> None:
    one = begin(3)
    one.until("mask")
    member = one.members["owner-1"]
    dealt, values = one.server.dealt_for("owner-1"), one.values["owner-1"]
    early: list[Callable[[], object]] = [
        member.advert,
        lambda: member.deal(one.server.cohort()),
        lambda: member.sign({}),
        lambda: member.reveal({}),
    ]
    for act in early:
        refused(act, "'owner-1' is dealt: this step comes after", ExitCode.ENGINE)
    assert member.step == "dealt"
    one.mask()
    assert member.exposed
    refused(lambda: member.mask(values, dealt), "is masked", ExitCode.ENGINE)
    one.sign()
    one.reveal()
    for act in early:
        refused(act, "is revealed", ExitCode.ENGINE)
    assert np.array_equal(one.server.total(), one.expected(one.members))


def test_v36_a_second_cohort_for_the_same_attempt_isrefused() -> None:
    one = begin(4)
    cohort = one.join()
    member = one.members["owner-0"]
    member.deal(_rows(cohort, [0, 1, 2]))
    refused(lambda: member.deal(cohort), "is dealt: this step", ExitCode.ENGINE)


# ---------------------------------------------------------------- shares


def test_a_sealed_share_that_was_altered_isrefused() -> None:
    for at in (0, 70, 147, 148):
        one = begin(3)
        one.until("mask")
        member = one.members["owner-1"]
        dealt = altered(one.server.dealt_for("owner-1"), "sealed", at)
        sender = "owner-0" if at < 148 else "owner-2"
        refused(
            lambda one=one, member=member, dealt=dealt: member.mask(one.values["owner-1"], dealt),
            f"what '{sender}' sealed was altered", ExitCode.SIGNATURE, member,
        )  # fmt: skip
        assert not member.exposed


def test_shares_cannot_be_sent_to_another_or_back() -> None:
    one = begin(4)
    one.until("mask")
    member = one.members["owner-1"]
    others = one.server.dealt_for("owner-2")["sealed"]  # from 0, 1 and 3
    own = one.server.dealt_for("owner-1")
    for sealed in (
        own["sealed"][[1, 0, 2]],
        np.stack([others[0], own["sealed"][1], own["sealed"][2]]),
        np.stack([own["sealed"][0], others[1], own["sealed"][2]]),  # what it sent itself
    ):
        tried = twin(member)
        refused(
            lambda tried=tried, sealed=sealed: tried.mask(
                one.values["owner-1"], own | {"sealed": sealed}
            ),
            "was altered", ExitCode.SIGNATURE, tried,
        )  # fmt: skip
    member.mask(one.values["owner-1"], own)


def test_the_key_that_seals_shares_is_never_shared_out() -> None:
    one = begin(3)
    one.join()
    member = one.members["owner-0"]
    secrets = member._secrets
    assert secrets.seal.private_bytes_raw() != secrets.mask_seed
    public = one.server.cohort()["mask_key"][0].tobytes()
    assert (
        X25519PrivateKey.from_private_bytes(secrets.mask_seed).public_key().public_bytes_raw()
        == public
    )
    assert secrets.seal.public_key().public_bytes_raw() != public


@pytest.mark.parametrize("gone", [{}, {"owner-2": "deal"}, {"owner-2": "deal", "owner-4": "deal"}])
def test_v36_never_both_shares_of_one_member(gone: dict[str, str]) -> None:
    one = begin(5, share=0.55)
    one.deal()
    one.mask(name for name in one.server.dealers() if name not in gone)
    one.sign()
    signed = one.server.signed()
    for name in one.server.summed():
        member = one.members[name]
        held = dict(member._held)
        assert sorted(held) == list(range(5))
        shares = [row.tobytes() for row in member.reveal(signed)["share"]]
        assert len(shares) == 5
        for other, (of_self, of_key) in held.items():
            dropped = f"owner-{other}" in gone
            assert shares[other] == (of_key if dropped else of_self)
            assert (of_self if dropped else of_key) not in shares
        knows_nothing(member)
        refused(lambda member=member: member.reveal(signed), "is revealed", ExitCode.ENGINE)


@pytest.mark.parametrize("liar", [0, 2, 3])
@pytest.mark.parametrize("gone", [{}, {"owner-1": "deal"}])
def test_one_wrong_share_is_outvoted_where_there_is_one_more_than_needed(
    liar: int, gone: dict[str, str]
) -> None:
    for share, last in itertools.product((0, 3), ("every", "enough")):
        one = begin(5, share=0.55)  # three of five
        one.deal()
        one.mask(name for name in one.server.dealers() if name not in gone)
        one.sign()
        revealing = [f"owner-{at}" for at in (liar, *{0, 2, 3} - {liar})]
        if last == "every":
            revealing.append("owner-4")
        for name in revealing:
            record = one.members[name].reveal(one.server.signed())
            if name == f"owner-{liar}":
                record = altered(record, "share", 66 * share + 65)
            one.server.take_reveal(name, record)
        if last == "every":
            assert np.array_equal(one.server.total(), one.expected(one.server.summed()))
            continue
        masked = one.server._sum.copy()
        refused(one.server.total, rf"the shares of 'owner-{share}'", ExitCode.PRIVACY)
        assert np.array_equal(one.server._sum, masked)  # no mask came off


def test_a_dealer_whose_shares_give_nothing_stops_the_sum_and_is_named() -> None:
    one = begin(4)
    one.join()
    cheat = one.members["owner-2"]
    drawn = cheat._secrets
    cheat._secrets = type(drawn)(drawn.mask_seed, bytes(32), drawn.seal)  # not what it pledged
    one.deal()
    one.mask()
    one.sign()
    one.reveal()
    refused(one.server.total, "the shares of 'owner-2'", ExitCode.PRIVACY)

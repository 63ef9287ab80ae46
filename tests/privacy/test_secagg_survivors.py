"""One set of survivors, signed by enough, is all that is ever opened; and what is kept."""

import itertools
import re

import numpy as np
import pytest

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.secagg import Record
from fedtune.privacy.secagg_mask import add_masks
from fedtune.privacy.secagg_records import cohort_of
from fedtune.privacy.secagg_rules import dealers_text, survivors_text
from tests.privacy.secagg_rounds import (
    Sum,
    altered,
    begin,
    knows_nothing,
    play,
    refused,
    signer_of,
    twin,
)

# ---------------------------------------------------------------- survivors


def _survivors(one: Sum, chosen: list[int]) -> Record:
    """Return the set that a cheating server might name, with what it was sent."""
    flags = np.zeros(len(one.members), np.uint8)
    flags[chosen] = 1
    seen = [np.frombuffer(one.server._seen[at], np.uint8) for at in sorted(chosen)]
    return {"survivors": flags, "dealers": np.ones(len(flags), np.uint8), "signature":
            np.stack(seen)}  # fmt: skip


def test_v36_two_sets_of_survivors_are_never_both_opened() -> None:
    one = begin(5)
    one.until("sign")
    first, second = _survivors(one, [0, 1, 2, 3]), _survivors(one, [0, 1, 2, 3, 4])
    signatures: dict[str, dict[int, bytes]] = {"first": {}, "second": {}}
    for at in range(5):
        chosen = "first" if at < 3 else "second"
        member = one.members[f"owner-{at}"]
        signature = member.sign(first if chosen == "first" else second)["signature"]
        signatures[chosen][at] = signature.tobytes()
        refused(lambda member=member: member.sign(second), "is signed: this step", ExitCode.ENGINE)
    for at in range(5):
        member = one.members[f"owner-{at}"]
        own = signatures["first" if at < 3 else "second"]
        flags = np.zeros(5, np.uint8)
        flags[list(own)] = 1
        few = {"signers": flags, "signature": np.stack(
            [np.frombuffer(value, np.uint8) for value in own.values()])}  # fmt: skip
        tried = twin(member)
        refused(
            lambda tried=tried, few=few: tried.reveal(few),
            rf"{len(own)} signed, of whom 4", ExitCode.QUORUM, tried,
        )  # fmt: skip
        flags = np.array([1, 1, 1, 1, 0], np.uint8)
        every = {**signatures["first"], **signatures["second"]}
        mixed = {"signers": flags, "signature": np.stack(
            [np.frombuffer(every[place], np.uint8) for place in range(4)])}  # fmt: skip
        refused(
            lambda member=member, mixed=mixed: member.reveal(mixed), "is not over what",
            ExitCode.SIGNATURE, member,
        )  # fmt: skip


def test_v36_an_unsigned_set_is_not_opened() -> None:
    one = begin(3)
    one.until("reveal")
    signed = one.server.signed()
    for forged in (
        signed | {"signature": np.zeros((3, 64), np.uint8)},
        altered(signed, "signature", 0),
        altered(signed, "signature", 130),
        signed | {"signature": signed["signature"][[1, 0, 2]]},
        signed | {"signature": signed["signature"][[0, 0, 0]]},
    ):
        member = twin(one.members["owner-1"])
        refused(
            lambda member=member, forged=forged: member.reveal(forged), "is not over what",
            ExitCode.SIGNATURE, member,
        )  # fmt: skip
    nobody = {"signers": np.zeros(3, np.uint8), "signature": np.zeros((0, 64), np.uint8)}
    member = one.members["owner-1"]
    refused(lambda: member.reveal(nobody), "0 signed", ExitCode.QUORUM, member)


def test_signatures_of_those_who_dropped_out_do_not_count() -> None:
    one = begin(5)
    one.deal()
    one.mask(f"owner-{at}" for at in range(4))
    one.sign([f"owner-{at}" for at in range(3)])
    member = one.members["owner-0"]
    text = survivors_text(one.server._cohort, member._dealers, member._survivors)
    rows = [np.frombuffer(one.server._signatures[at], np.uint8) for at in range(3)]
    outside = np.frombuffer(signer_of("owner-4").sign(text), np.uint8)
    forged = {"signers": np.array([1, 1, 1, 0, 1], np.uint8), "signature": np.stack(
        [*rows, outside])}  # fmt: skip
    refused(lambda: member.reveal(forged), "4 signed, of whom 4", ExitCode.QUORUM, member)


def test_survivors_below_the_threshold_or_without_a_vector_arerefused() -> None:
    one = begin(5)
    one.until("sign")
    for chosen, words, code in (
        ([0, 1, 2], "3 survivors of 5: at least 4", ExitCode.QUORUM),
        ([1, 2, 3, 4], "'owner-0' is not among the survivors", ExitCode.QUORUM),
    ):
        member = twin(one.members["owner-0"])
        refused(
            lambda member=member, chosen=chosen: member.sign(_survivors(one, chosen)), words,
            code, member,
        )  # fmt: skip
    # named a survivor, but it never sent a vector: it cannot have signed whom it saw
    forged = _survivors(one, [0, 1, 2, 3, 4])
    forged["signature"][4] = forged["signature"][3]
    member = one.members["owner-0"]
    refused(lambda: member.sign(forged), "signature of 'owner-4'", ExitCode.SIGNATURE, member)


def test_members_who_were_shown_different_dealers_are_not_summed() -> None:
    # Of five, owner-0 is told that only the last three others dealt; the others that all did.
    one = begin(5)
    one.until("mask")
    victim = one.members["owner-0"]
    dealt = one.server.dealt_for("owner-0")
    lied = {"dealers": np.array([1, 0, 1, 1, 1], np.uint8), "sealed": dealt["sealed"][1:]}
    sent = victim.mask(one.values["owner-0"], lied)
    refused(lambda: one.server.add("owner-0", sent), "'owner-0' is not over", ExitCode.SIGNATURE)
    one.mask(f"owner-{at}" for at in range(1, 5))
    one.server._seen[0] = sent["signature"].tobytes()  # a server that does not care
    forged = _survivors(one, [0, 1, 2, 3, 4])
    member = one.members["owner-1"]
    refused(lambda: member.sign(forged), "signature of 'owner-0'", ExitCode.SIGNATURE, member)
    refused(lambda: victim.sign(forged), "other dealers are named", ExitCode.PRIVACY, victim)
    own = forged | {"dealers": lied["dealers"]}
    refused(lambda: one.members["owner-2"].sign(own), "other dealers", ExitCode.PRIVACY)


def test_a_survivor_that_did_not_deal_isrefused() -> None:
    one = begin(5)
    one.deal([f"owner-{at}" for at in range(4)])
    one.mask()
    flags = np.ones(5, np.uint8)
    member = one.members["owner-0"]
    text = dealers_text(one.server._cohort, member._dealers)
    rows = [np.frombuffer(one.server._seen[at], np.uint8) for at in range(4)]
    rows.append(np.frombuffer(signer_of("owner-4").sign(text), np.uint8))
    forged = {"survivors": flags, "dealers": np.array([1, 1, 1, 1, 0], np.uint8),
              "signature": np.stack(rows)}  # fmt: skip
    refused(lambda: member.sign(forged), "has not dealt", ExitCode.PRIVACY, member)


# ---------------------------------------------------------------- masks, and what is kept


def test_v36_masks_of_two_attempts_have_nothing_in_common() -> None:
    zero = np.zeros(4096, np.uint32)
    seen = []
    for changes in ({}, {}, {"attempt": 1}, {"round": 5}):
        one = begin(2, length=4096, **changes)
        one.until("mask")
        masked = one.members["owner-0"].mask(zero, one.server.dealt_for("owner-0"))["values"]
        seen.append(masked)
        bits = np.unpackbits(masked.view(np.uint8)).mean()
        assert abs(bits - 0.5) < 0.01  # 131,072 bits: 7 standard deviations
    for first, second in itertools.combinations(seen, 2):
        assert (first == second).sum() <= 2  # by chance 1e-6 each


def test_what_one_member_sends_says_nothing_without_the_others() -> None:
    zero, most = np.zeros(4096, np.uint32), np.full(4096, 2**32 - 1, np.uint32)
    for values in (zero, most):
        one = begin(3, length=4096)
        one.until("mask")
        masked = one.members["owner-0"].mask(values, one.server.dealt_for("owner-0"))["values"]
        assert abs(float(masked.mean()) / 2**32 - 0.5) < 0.03  # 6.6 standard deviations
        # even with every mask that it shares with the others: one remains
        salt = one.server._context.place() + one.server._cohort.digest
        from fedtune.privacy.secagg_mask import mask_key

        for other in (1, 2):
            private = one.members[f"owner-{other}"]._secrets.mask()
            public = one.server._cohort.adverts[0].mask_key
            key = mask_key(private, public, salt, ("owner-0", f"owner-{other}"))
            add_masks(masked, [(key, True)])
        assert not np.array_equal(masked, values)
        assert abs(float(masked.mean()) / 2**32 - 0.5) < 0.03


def test_secrets_are_in_no_words_and_are_forgotten() -> None:
    one = begin(3)
    one.until("reveal")
    signed = one.server.signed()
    member = one.members["owner-1"]
    secrets = [share for pair in member._held.values() for share in pair]
    assert len(secrets) == 6
    shown = repr(member) + str(member) + repr(one.server)
    assert not any(secret.hex() in shown or repr(secret) in shown for secret in secrets)
    member.reveal(signed)
    knows_nothing(member)
    assert member.exposed

    early = begin(3).members["owner-0"]
    early.advert()
    drawn = early._secrets
    text = repr(drawn) + repr(early)
    for secret in (drawn.mask_seed, drawn.self_seed):
        assert secret.hex() not in text
        assert repr(secret) not in text
    early.close()
    knows_nothing(early)
    assert not early.exposed
    refused(lambda: early.deal({}), "is closed", ExitCode.ENGINE)


def test_after_masking_a_member_keeps_only_what_others_entrusted_to_it() -> None:
    one = begin(3)
    one.until("sign")
    for member in one.members.values():
        assert member._secrets is None
        assert not member._openers


# ---------------------------------------------------------------- the collector


def test_the_collector_takes_each_once_and_only_of_those_who_are_in() -> None:
    one = begin(4)
    member = one.members["owner-0"]
    advert = member.advert()
    one.server.take_advert("owner-0", advert)
    refused(lambda: one.server.take_advert("owner-0", advert), "already", ExitCode.ENGINE)
    refused(
        lambda: one.server.take_advert("owner-1", advert), "'owner-1' is not", ExitCode.SIGNATURE
    )
    refused(lambda: one.server.take_deal("owner-0", {}), "takes adverts", ExitCode.ENGINE)
    for name in ("owner-1", "owner-2", "owner-3"):
        one.server.take_advert(name, one.members[name].advert())
    cohort = one.server.cohort()
    refused(lambda: one.server.take_advert("owner-3", advert), "takes deals", ExitCode.ENGINE)
    deals = {name: party.deal(cohort) for name, party in one.members.items()}
    refused(lambda: one.server.take_deal("zoe", deals["owner-0"]), "'zoe'", ExitCode.QUORUM)
    for name in ("owner-0", "owner-1", "owner-2"):
        one.server.take_deal(name, deals[name])
    refused(lambda: one.server.take_deal("owner-0", deals["owner-0"]), "already", ExitCode.ENGINE)
    sent = one.members["owner-0"].mask(one.values["owner-0"], one.server.dealt_for("owner-0"))
    refused(lambda: one.server.take_deal("owner-3", deals["owner-3"]), "vectors", ExitCode.ENGINE)
    refused(lambda: one.server.dealt_for("owner-3"), "has not dealt", ExitCode.QUORUM)
    refused(lambda: one.server.add("owner-3", sent), "has not dealt", ExitCode.QUORUM)
    refused(lambda: one.server.add("owner-1", sent), "'owner-1' is not", ExitCode.SIGNATURE)
    one.server.add("owner-0", sent)
    before = one.server._sum.copy()
    refused(lambda: one.server.add("owner-0", sent), "already", ExitCode.ENGINE)
    assert np.array_equal(one.server._sum, before)
    one.mask(["owner-1", "owner-2"])
    one.sign(["owner-0", "owner-1"])
    signature = {"signature": np.zeros(64, np.uint8)}
    refused(lambda: one.server.take_signature("owner-3", signature), "survivors", ExitCode.QUORUM)
    refused(lambda: one.server.take_signature("owner-0", signature), "already", ExitCode.ENGINE)
    refused(lambda: one.server.take_signature("owner-2", signature), "not over", ExitCode.SIGNATURE)
    refused(one.server.signed, "2 signed: 3 are needed", ExitCode.QUORUM)
    one.sign(["owner-2"])
    one.reveal()
    refused(lambda: one.server.take_reveal("owner-0", {}), "already", ExitCode.ENGINE)
    assert np.array_equal(one.server.total(), one.expected(["owner-0", "owner-1", "owner-2"]))


def test_errors_are_short_and_without_numbers_of_anybody() -> None:
    one = begin(3, length=3)
    one.until("mask")
    values = np.array([77777, 88888, 99999], np.uint32)
    with pytest.raises(FedtuneError) as caught:
        one.members["owner-0"].mask(values.astype(np.int64), one.server.dealt_for("owner-0"))
    assert not re.search("77777|88888|99999", str(caught.value) + caught.value.hint)
    assert one.members["owner-0"].step == "dealt"
    assert play(begin(2), {}).shape == (5,)


def test_what_was_signed_is_only_this_cohort() -> None:
    one, other = begin(3), begin(3)
    first, second = one.join(), other.join()
    digest = one.context.digest()
    assert digest == other.context.digest()
    assert cohort_of(first, digest).digest != cohort_of(second, digest).digest

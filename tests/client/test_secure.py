"""One client's side of a secure sum: what it refuses, and what it never gives twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.adapters import Tensors
from fedtune.client.private import open_shared_guard
from fedtune.client.secure import Masking, Party, split_dealt
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.noise import SecureNoise
from fedtune.privacy.plan import least_survivors
from fedtune.privacy.secagg import Collector, Context, from_field
from fedtune.privacy.summing import model_digest, summing
from fedtune.wire import DEALT, WITHHELD, Advert, Dealt, Revealed, Signed, Task, Update
from tests.client.node_kit import CLIENTS, experiment

NAMES = ("ann", "bob", "cy")
MODEL: Tensors = {"a": np.ones((2, 3), np.float32)}
SHAPES = {"a": (2, 3)}
TERMS, RATE = "agreed", 0.1
SHARED = experiment(
    privacy__example=None, privacy__client=CLIENTS, federation__secure={"threshold": 1.0}
)
BARE = experiment(privacy__example=None, federation__secure={"clip_norm": 5.0})


class Cohort:
    """Three clients and a collector; a round goes as far as it is told to."""

    def __init__(self, config: Config, folder: Path, min_cohort: int = 2) -> None:
        self.config = config
        self.signers = {name: Ed25519PrivateKey.generate() for name in NAMES}
        public = {name: key.public_key() for name, key in self.signers.items()}
        ledger = config.privacy.model_copy(update={"ledger": str(folder / "l.db"), "dataset": "d"})
        own = config.model_copy(update={"privacy": ledger})
        self.clients = {
            name: Masking(
                own, Party(name, key, lambda: public, min_cohort),
                open_shared_guard(own), TERMS, folder / name,
            )
            for name, key in self.signers.items()
        }  # fmt: skip
        self.public = public

    def context(self, number: int, attempt: int) -> Context:
        secure = self.config.federation.secure
        assert secure is not None
        digest = model_digest(MODEL, TERMS, RATE)
        return Context(
            job="job", round=number, attempt=attempt, model=digest, length=6,
            share=secure.threshold, min_cohort=secure.min_cohort,
            min_survivors=least_survivors(self.config),
        )  # fmt: skip

    def to_masks(self, number: int, attempt: int, update: Tensors) -> Collector:
        """Go through a round until every client's masked update is in."""
        server = Collector(self.context(number, attempt), self.public)
        asked = advert(number, attempt)
        for name, client in self.clients.items():
            server.take_advert(name, client.advert(asked, 6).tensors)
        cohort = Dealt(number, attempt, server.cohort())
        for name, client in self.clients.items():
            server.take_deal(name, client.deal(cohort).tensors)
        task = Task(number, attempt, 0, 0.1, MODEL, "job")
        source = SecureNoise() if self.config.privacy.client else None
        for name, client in self.clients.items():
            client.begin(task)
            given = Update(number, attempt, 9, 4, 1, 0.7, update)
            masked = client.mask(given, SHAPES, server.dealt_for(name), source)
            server.add(name, masked.tensors)
            assert (masked.examples, masked.steps, masked.truncated) == (1, 0, 0)
            assert masked.loss == WITHHELD
        return server

    def to_end(self, number: int, attempt: int, update: Tensors) -> np.ndarray[Any, Any]:
        server = self.to_masks(number, attempt, update)
        asked = Signed(number, attempt, server.survivors())
        for name, client in self.clients.items():
            server.take_signature(name, client.sign(asked).tensors)
        signed = Revealed(number, attempt, server.signed())
        for name, client in self.clients.items():
            server.take_reveal(name, client.reveal(signed).tensors)
        return from_field(server.total())


def advert(number: int = 1, attempt: int = 0) -> Advert:
    digest = np.frombuffer(model_digest(MODEL, TERMS, RATE), np.uint8)
    return Advert(number, attempt, {"model": digest}, "job")


def refused(what: Any, words: str, code: ExitCode) -> None:
    with pytest.raises(FedtuneError, match=words) as caught:
        what()
    assert caught.value.code == code


def test_the_sum_is_that_of_the_clipped_updates(tmp_path: Path) -> None:
    cohort, update = Cohort(BARE, tmp_path), {"a": np.full((2, 3), 0.25, np.float32)}
    how = summing(SHAPES, 3, 5.0)
    found = how.unflatten(cohort.to_end(1, 0, update))["a"]
    np.testing.assert_allclose(found, 0.75, atol=3 * how.grid)
    large = how.unflatten(cohort.to_end(2, 0, {"a": np.full((2, 3), 1e6, np.float32)}))["a"]
    assert 0.999 * 15 < float(np.linalg.norm(large)) <= 15
    spoilt = {"a": np.full((2, 3), np.nan, np.float32)}
    assert not cohort.to_end(3, 0, spoilt).any()


def test_an_update_under_masks_is_in_one_sum_only(tmp_path: Path) -> None:
    """Also where the sum never came out, and where the process is another one."""
    cohort = Cohort(BARE, tmp_path)
    cohort.to_masks(2, 0, {"a": np.ones((2, 3), np.float32)})
    ann = cohort.clients["ann"]
    again = Masking(ann.config, ann.party, None, TERMS, ann.home)
    for client in (ann, again):
        for number, attempt in ((2, 1), (2, 7), (1, 9)):
            refused(
                lambda: client.advert(advert(number, attempt), 6),  # noqa: B023 - at once
                "left under masks once", ExitCode.PRIVACY,
            )  # fmt: skip
        client.advert(advert(3, 0), 6)


def test_an_attempt_is_begun_once_and_in_order(tmp_path: Path) -> None:
    ann = Cohort(BARE, tmp_path).clients["ann"]
    ann.advert(advert(1, 2), 6)
    for attempt in (2, 1, 0):
        asked = advert(1, attempt)
        refused(lambda: ann.advert(asked, 6), "is over", ExitCode.PRIVACY)  # noqa: B023 - at once
    ann.advert(advert(1, 3), 6)


def test_steps_of_another_attempt_are_refused(tmp_path: Path) -> None:
    cohort = Cohort(BARE, tmp_path)
    server = cohort.to_masks(1, 0, {"a": np.ones((2, 3), np.float32)})
    ann, survivors = cohort.clients["ann"], server.survivors()
    for number, attempt in ((1, 1), (2, 0), (0, 0)):
        asked = Signed(number, attempt, survivors)
        refused(lambda: ann.sign(asked), "has no masks here", ExitCode.QUORUM)  # noqa: B023
    ann.sign(Signed(1, 0, survivors))
    refused(lambda: ann.sign(Signed(1, 0, survivors)), "this step comes after", ExitCode.ENGINE)


def test_a_model_that_the_cohort_was_not_told_of_is_not_tuned(tmp_path: Path) -> None:
    config = SHARED
    cohort = Cohort(config, tmp_path)
    ann = cohort.clients["ann"]
    ann.advert(advert(), 6)
    task = Task(1, 0, 0, 0.1, MODEL, "job")
    others: list[Tensors] = [
        {"a": MODEL["a"] + np.float32(1e-7)}, {"b": MODEL["a"]}, {}, MODEL | {"b": MODEL["a"]},
        {"a": MODEL["a"].reshape(3, 2)},
    ]  # fmt: skip
    for tensors in others:
        refused(
            lambda: ann.begin(replace(task, tensors=tensors)),  # noqa: B023 - at once
            "not those that the cohort was told of", ExitCode.PRIVACY,
        )  # fmt: skip
    assert ann.guard is not None
    assert ann.guard.ledger.accounts() == []  # nothing is charged for what is refused
    for other in (replace(task, lr=0.2), replace(task, lr=-0.1)):
        refused(lambda: ann.begin(other), "cohort was told of", ExitCode.PRIVACY)  # noqa: B023
    ann.begin(task)
    (account,) = ann.guard.ledger.accounts()
    assert sum(ann.guard.ledger.groups(account).values()) == 1


def test_every_attempt_with_noise_is_charged_and_noised_anew(tmp_path: Path) -> None:
    config = SHARED
    cohort, nothing = Cohort(config, tmp_path), {"a": np.zeros((2, 3), np.float32)}
    sums = [cohort.to_end(1, attempt, nothing) for attempt in range(3)]
    assert len({one.tobytes() for one in sums}) == 3
    assert all(one.any() for one in sums)
    guard = cohort.clients["ann"].guard
    assert guard is not None
    account = guard.account("ann")
    assert sum(guard.ledger.groups(account).values()) == 3
    assert guard.ledger.in_flight(account) == 0


def test_a_promise_without_a_source_of_noise_is_refused(tmp_path: Path) -> None:
    config = SHARED
    cohort = Cohort(config, tmp_path)
    cohort.config = BARE.model_copy(update={"federation": config.federation})  # no source is given
    with pytest.raises(FedtuneError):
        cohort.to_masks(1, 0, {"a": np.zeros((2, 3), np.float32)})


def test_the_owners_floor_holds_whatever_the_settings_say(tmp_path: Path) -> None:
    cohort = Cohort(BARE, tmp_path, min_cohort=4)
    with pytest.raises(FedtuneError) as caught:
        cohort.to_masks(1, 0, {"a": np.ones((2, 3), np.float32)})
    assert caught.value.code in {ExitCode.PRIVACY, ExitCode.SIGNATURE}


@pytest.mark.parametrize(
    "tensors",
    [
        {}, {"model": np.zeros(31, np.uint8)}, {"model": np.zeros(32, np.int8)},
        {"model": np.zeros((32, 1), np.uint8)}, {"other": np.zeros(32, np.uint8)},
        {"model": np.zeros(32, np.uint8), "more": np.zeros(1, np.uint8)},
    ],
)  # fmt: skip
def test_an_attempt_without_the_digest_of_its_model_is_refused(
    tmp_path: Path, tensors: dict[str, Any]
) -> None:
    ann = Cohort(BARE, tmp_path).clients["ann"]
    refused(lambda: ann.advert(Advert(1, 0, tensors, "job"), 6), "digest", ExitCode.ENGINE)


def test_shares_and_parameters_are_told_apart() -> None:
    own, dealt = split_dealt({"a": MODEL["a"], f"{DEALT}sealed": MODEL["a"], "secure": MODEL["a"]})
    assert (set(own), set(dealt)) == ({"a", "secure"}, {"sealed"})

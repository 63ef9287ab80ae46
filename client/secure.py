"""A client's side of secure aggregation: its update leaves only under masks.

One attempt of one round at a time. Nothing of it is kept on disk: a client that dies is one
that dropped out, and the others take its masks off the sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from fedtune.adapters import Tensors
from fedtune.client.private import Guard
from fedtune.config import Config
from fedtune.config_server import SecureConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import write_atomic
from fedtune.pool.codec import COEFFICIENTS, from_wire, unpack
from fedtune.privacy.ledger import Reservation
from fedtune.privacy.noise import NoiseSource
from fedtune.privacy.plan import least_survivors
from fedtune.privacy.secagg import Context, Member, to_field
from fedtune.privacy.summing import model_digest, summing_of
from fedtune.wire import DEALT, REVEALED, WITHHELD, Advert, Dealt, Revealed, Signed, Task, Update

__all__ = ["Masking", "Party", "split_dealt"]

_LAST = "masked"


@dataclass(frozen=True)
class Party:
    """Who a client is to the others of a cohort.

    Attributes
    ----------
    name : str
    signer : Ed25519PrivateKey
        Its long-term identity.
    roster : callable
        Returns everybody's long-term public keys, as this client trusts them.
    min_cohort : int
        Fewer members are refused, whatever the server's settings say.
    """

    name: str
    signer: Ed25519PrivateKey = field(repr=False)
    roster: Callable[[], Mapping[str, Ed25519PublicKey]] = field(repr=False)
    min_cohort: int = 2


@dataclass
class Masking:
    """The attempts of one client of one run.

    Parameters
    ----------
    config : Config
        With ``[federation.secure]``.
    party : Party
    guard : Guard or None
        The owner's ledger, where noise at the clients is promised.
    agreed : str
        SHA-256 of the terms that this client agreed to.
    home : Path or None
        Where the client keeps what must outlive its process.
    """

    config: Config
    party: Party
    guard: Guard | None
    agreed: str
    home: Path | None = None
    _member: Member | None = field(default=None, repr=False)
    _context: Context | None = None
    _at: tuple[int, int] = (-1, -1)
    _members: int = 0
    _paid: Reservation | None = field(default=None, repr=False)
    _last: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def advert(self, asked: Advert, length: int) -> Advert:
        """Begin an attempt; whatever an earlier one left is forgotten.

        Parameters
        ----------
        asked : Advert
            ``tensors["model"]``: the SHA-256 of what will be sent to be tuned.
        length : int
            Numbers in an update.

        Raises
        ------
        FedtuneError
            This round's update left under masks already: others may take them off, and an
            update that is in two sums stands bare in their difference. Or an attempt that is
            over is asked for again.
        """
        with self._lock:
            number = asked.round
            if number <= self._masked() and not self._noised:
                raise FedtuneError(f"{REVEALED}: round {number}", code=ExitCode.PRIVACY)
            if (number, asked.attempt) <= self._at:
                raise FedtuneError(
                    f"attempt {number}.{asked.attempt} is over", code=ExitCode.PRIVACY
                )
            self._close()
            settings = self._settings
            context = Context(
                job=asked.job, round=number, attempt=asked.attempt, model=_digest(asked.tensors),
                length=length, share=settings.threshold,
                min_cohort=max(settings.min_cohort, self.party.min_cohort),
                min_survivors=least_survivors(self.config),
            )  # fmt: skip
            self._member = Member(context, self.party.name, self.party.signer, self.party.roster())
            self._context, self._at = context, (number, asked.attempt)
            return Advert(number, asked.attempt, self._member.advert())

    def deal(self, asked: Dealt) -> Dealt:
        """Give each neighbour its encrypted share."""
        with self._lock:
            member = self._now(asked.round, asked.attempt)
            found = member.deal(asked.tensors)
            self._members = member.members
            self._require_honest(member.members)
            return Dealt(asked.round, asked.attempt, found)

    def begin(self, task: Task) -> None:
        """Check that the model which came is the one the cohort was told of; pay for the round.

        Raises
        ------
        FedtuneError
            Another model, another attempt, or the owner's ledger refuses.
        """
        with self._lock:
            self._now(task.round, task.attempt)
            if self._context is None or _asked(task, self.agreed) != self._context.model:
                raise FedtuneError(
                    "the model, learning rate or terms are not those that the cohort was told of",
                    hint="the server shows clients different ones", code=ExitCode.PRIVACY,
                )  # fmt: skip
        if self.guard is not None:
            facts = {"noise": "at the clients", "members": self._members}
            self._paid = self.guard.reserve(self.party.name, task, facts)

    def mask(
        self, update: Update, shapes: Mapping[str, tuple[int, ...]], dealt: Tensors,
        source: NoiseSource | None,
    ) -> Update:  # fmt: skip
        """Return the update clipped, noised and masked; of itself it tells nothing."""
        with self._lock:
            member = self._now(update.round, update.attempt)
            how = summing_of(self.config, shapes, self._members)
            steps = how.flatten(_dense(update.tensors, self.config), source)
            vector = to_field(steps, self._members, how.most)
            if self.guard is not None and self._paid is not None:
                # Before anything can leave; raises when it was let go before.
                self.guard.ledger.release(self._paid)
            self._remember(update.round)
            masked = member.mask(vector, dealt)
            return replace(
                update, examples=1, steps=0, truncated=0, loss=WITHHELD, tensors=masked,
                cut_up=0, cut_down=0, kept=0,
            )  # fmt: skip

    def sign(self, asked: Signed) -> Signed:
        """Sign who survived, once."""
        with self._lock:
            found = self._now(asked.round, asked.attempt).sign(asked.tensors)
            return Signed(asked.round, asked.attempt, found)

    def reveal(self, asked: Revealed) -> Revealed:
        """Give what takes the masks off the sum of those who survived, once."""
        with self._lock:
            found = self._now(asked.round, asked.attempt).reveal(asked.tensors)
            self._close()
            return Revealed(asked.round, asked.attempt, found)

    def close(self) -> None:
        """Forget every secret."""
        with self._lock:
            self._close()

    @property
    def _settings(self) -> SecureConfig:
        if self.config.federation.secure is None:
            raise FedtuneError("no [federation.secure]", code=ExitCode.CONFIG)
        return self.config.federation.secure

    @property
    def _noised(self) -> bool:
        return self.config.privacy.client is not None

    def _require_honest(self, members: int) -> None:
        """Refuse a cohort in which those who may collude could show two survivor sets.

        Against a server that cheats they must be fewer than ``2 t - n`` (Bonawitz et al. 2017,
        section 6.2), or the noise of one client alone would stand against them.
        """
        settings = self._settings
        if self._noised and not settings.tolerates(members):
            self._close()
            raise FedtuneError(
                f"{members} members with federation.secure.threshold={settings.threshold:.3g} "
                f"do not hold out against colluding={settings.colluding}",
                hint="raise threshold, or have more members", code=ExitCode.PRIVACY,
            )  # fmt: skip

    def _masked(self) -> int:
        """Return the last round whose update left under masks."""
        file = self.home / _LAST if self.home else None
        if file is not None and file.is_file():
            self._last = max(self._last, int(file.read_text(encoding="ascii")))
        return self._last

    def _remember(self, number: int) -> None:
        """Note, before it leaves, that this round's update is in a sum."""
        self._last = max(self._last, number)
        if self.home is not None:
            write_atomic(self.home / _LAST, str(self._last).encode())

    def _close(self) -> None:
        if self._member is not None:
            self._member.close()
        self._member = self._context = self._paid = None

    def _now(self, number: int, attempt: int) -> Member:
        if self._member is None or (number, attempt) != self._at:
            raise FedtuneError(
                f"attempt {number}.{attempt} has no masks here",
                hint="this client came back in between: it takes part in the next round",
                code=ExitCode.QUORUM,
            )
        return self._member


def _asked(task: Task, agreed: str) -> bytes:
    return model_digest(task.tensors, agreed, task.lr)


def split_dealt(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Return a task's own tensors, and the shares that came with them."""
    own = {name: value for name, value in tensors.items() if not name.startswith(DEALT)}
    dealt = {name.removeprefix(DEALT): value for name, value in tensors.items() if name not in own}
    return own, dealt


def _digest(tensors: Mapping[str, NDArray[np.generic]]) -> bytes:
    found = tensors.get("model")
    if found is None or found.dtype != np.uint8 or found.shape != (32,) or len(tensors) != 1:
        raise FedtuneError("an attempt without the digest of its model", code=ExitCode.ENGINE)
    return found.tobytes()


def _dense(tensors: Tensors, config: Config) -> Tensors:
    """Return an update as floats: coefficients travel packed otherwise."""
    if not config.tuning.seeded:
        return tensors
    return {COEFFICIENTS: unpack(from_wire(tensors, config.tuning.pool.size))}

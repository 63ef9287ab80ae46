"""A node: one owner's text, one process, one federation, whatever its server asks.

Takes and gives Flower messages, and knows nothing of how they travel. The experiment's
terms come first; what the owner's policy does not allow is refused before anything is
loaded. What leaves is written down before it leaves.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.client.app import make_client_app, worker_for
from fedtune.client.failures import log_failure
from fedtune.client.policy import OwnerPolicy, asleep, judge, judge_model, within
from fedtune.client.secure import Party
from fedtune.client.sent import SentLog
from fedtune.config import Config
from fedtune.errors import ExitCode, FedtuneError
from fedtune.files import write_atomic, write_json
from fedtune.keys.node import Identity, public_of
from fedtune.keys.roster import Roster, decode, signers
from fedtune.privacy.accounting import spent as accounted
from fedtune.privacy.events import Charge, Event, Unit
from fedtune.privacy.ledger import Account, Claim, Ledger, open_ledger
from fedtune.privacy.ledger_records import Kind
from fedtune.privacy.plan import Promise, example_promise, promises
from fedtune.terms import Own, accept, check_length, digest_of, leaving
from fedtune.wire import (
    BUDGET,
    KINDS,
    Accepted,
    Advert,
    Terms,
    Update,
    from_record,
    size_of,
    to_record,
)

__all__ = ["Node", "Work"]

_FAILED = 2
_TOLD = frozenset(
    {
        ExitCode.BUDGET_EXHAUSTED, ExitCode.CONFIG, ExitCode.ENGINE, ExitCode.PRIVACY,
        ExitCode.QUORUM, ExitCode.SIGNATURE,
    }
)  # fmt: skip
_OF_DISKS = frozenset({ExitCode.LEDGER, ExitCode.STORAGE})
_JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}")
_TERMS = KINDS[Accepted]
_WORKS = frozenset({KINDS[Update], KINDS[Advert]})
_ANSWERED = frozenset(KINDS.values())
_NOTE = "the owner's policy"
_CURRENT, _PROPOSED, _SERIAL, _ROSTER = (
    "current.json", "proposed.json", "roster.json", "roster",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """An experiment that the owner's policy allows, ready to be worked on."""

    job: str
    digest: str
    config: Config
    app: ClientApp
    fingerprint: str


@dataclass
class Node:
    """Answers a server's messages for one owner.

    Parameters
    ----------
    home : Path
        The node's own folder: ledger, log, state of runs.
    identity : Identity
        Its enrolled name and keys.
    authority : bytes
        ``ca.pem`` of the federation: the roster must be signed by it.
    policy : OwnerPolicy
    own : Own
        Where text, model and ledger are.
    tell : callable
        Hears in plain words what the node does; it must not raise.
    """

    home: Path
    identity: Identity
    authority: bytes
    policy: OwnerPolicy
    own: Own
    tell: Callable[[str], None] = lambda _words: None
    now: Callable[[], datetime] = datetime.now
    _work: Work | None = field(default=None, repr=False)
    _roster: Roster | None = field(default=None, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def __post_init__(self) -> None:
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.sent = SentLog(self.home / "sent.jsonl")
        self.ledger: Ledger = open_ledger(self.own.ledger)

    def answer(self, message: Message) -> Message:
        """Return the reply to one message, after it is in the log of what left.

        What fails is a reply too: its words where they say nothing about rows or about this
        machine, and otherwise only that it failed.

        Raises
        ------
        FedtuneError
            The log cannot be written: nothing may leave.
        """
        with self._lock:
            kind = message.metadata.message_type
            try:
                reply = self._reply(kind, message)
            except Exception as error:  # noqa: BLE001 - whatever it is, the node lives on
                reply = Message(Error(code=_FAILED, reason=self._told(error)), reply_to=message)
            try:
                self.sent.write(kind, reply, size_of(reply), self._work.job if self._work else "")
            except FedtuneError as error:
                self.tell(f"nothing leaves: {error}")
                raise FedtuneError(
                    "the node cannot write down what leaves, so nothing does",
                    hint="its owner sees why", code=ExitCode.STORAGE,
                ) from error  # fmt: skip
            return reply

    def _reply(self, kind: str, message: Message) -> Message:
        if words := asleep(self.policy, self.now()):
            raise FedtuneError(words, code=ExitCode.PRIVACY)
        if kind not in _ANSWERED:
            # Flower would take "train.default" for "train"; here there is one name for each.
            raise FedtuneError(f"no answer to '{kind:.80}'", code=ExitCode.PRIVACY)
        if kind == _TERMS:
            return Message(to_record(self._agree(message)), reply_to=message)
        return self._do(message)

    def _told(self, error: Exception) -> str:
        """Return what a server may hear of a failure; the rest goes to the owner."""
        if isinstance(error, FedtuneError) and error.code in _TOLD:
            self.tell(f"refused: {error}" + (f" ({error.hint})" if error.hint else ""))
            return self._without_places(str(error))
        # Its words may quote rows: they go to a file that only the owner reads.
        log_failure(self.home / "errors.log", error)
        if isinstance(error, FedtuneError):
            # A disk that is full takes no log either; such words speak of files, not of rows.
            said = str(error) if error.code in _OF_DISKS else f"see {self.home / 'errors.log'}"
            self.tell(f"failed ({error.code.name}); {said}")
            return f"the node failed ({error.code.name}); its owner sees why"
        self.tell(f"failed: {type(error).__name__}; see {self.home / 'errors.log'}")
        return f"the node failed ({type(error).__name__}); its owner sees why"

    def _without_places(self, words: str) -> str:
        """Return words in which nothing says where on this machine things are."""
        own = self.own
        places = {own.source, own.ledger, own.model, own.body_root, own.body_key, str(self.home)}
        places.add(str(own.data.get("public", "")))
        places |= {str(Path(place).parent) for place in places if place}
        for place in sorted(places - {"", ".", "/"}, key=len, reverse=True):
            words = words.replace(place, "...")
        return words.replace(f"{own.dataset}/{own.name}", own.name)

    def work(self) -> Work | None:
        """Return what was last agreed to, if anything."""
        return self._work

    def spent(self) -> tuple[float, float] | None:
        """Return the epsilon that the ledger holds for this data set, and its cap."""
        work = self._work
        made = promises(work.config) if work else ()
        if work is None or not made:
            return None
        found = []
        for account in map(self._account, made):
            others, delta = self._elsewhere(work.job, account)
            found.append(self.ledger.spent(account, delta).epsilon + others)
        return max(found), self.policy.max_epsilon

    def _do(self, message: Message) -> Message:
        work = self._work or self._again()
        context = Context(
            message.metadata.run_id, message.metadata.dst_node_id, {"partition-id": 0},
            RecordDict(), {},
        )  # fmt: skip
        self._require_agreed(work, message)
        return work.app(message, context)

    def _require_agreed(self, work: Work, message: Message) -> None:
        """Refuse what is of another job than was agreed to, or beyond its last round."""
        fields: Mapping[str, Any] = message.content.config_records.get("fields") or {}
        job, number = fields.get("job", ""), fields.get("round", 0)
        works = message.metadata.message_type in _WORKS
        if job != work.job and (job or works):
            raise FedtuneError(
                f"{BUDGET}: this node agreed to job '{work.job}', not to '{job!s:.200}'",
                hint="a run sends its terms first", code=ExitCode.BUDGET_EXHAUSTED,
            )  # fmt: skip
        most = work.config.federation.rounds
        if works and not (isinstance(number, int) and 1 <= number <= most):
            raise FedtuneError(
                f"{BUDGET}: round {number!s:.20} of a plan of {most}",
                hint="more rounds are another run", code=ExitCode.BUDGET_EXHAUSTED,
            )  # fmt: skip

    def _agree(self, message: Message) -> Accepted:
        """Judge an experiment's terms, load what they need, and remember them."""
        asked = from_record(Terms, message.content)
        check_length(asked.terms)
        if not _JOB.fullmatch(asked.job):
            raise FedtuneError("the job has no proper name", code=ExitCode.CONFIG)
        self._roster = self._trusted(asked.tensors)
        digest = digest_of(asked.terms)
        before = self._read(self._folder(asked.job) / "terms.json")
        if before and before["digest"] != digest:
            raise FedtuneError(
                f"job '{asked.job}' had other terms before",
                hint="another experiment is another run", code=ExitCode.PRIVACY,
            )  # fmt: skip
        write_json(self.home / _PROPOSED, {"job": asked.job, "terms": asked.terms})
        work = self._work
        if work is None or (work.job, work.digest) != (asked.job, digest):
            work = self._open(asked.job, asked.terms)
        if asked.fingerprint != work.fingerprint:
            raise FedtuneError(
                f"the server's base model is {asked.fingerprint[:12]}, the one here is "
                f"{work.fingerprint[:12]}",
                hint="the same weights at both: compare sha256sum model.safetensors",
                code=ExitCode.CONFIG,
            )  # fmt: skip
        # First: what is charged below is charged for these terms, and for no others.
        record = {"job": asked.job, "digest": digest, "terms": asked.terms}
        write_json(self._folder(asked.job) / "terms.json", record)
        self._admit(work)
        write_json(self.home / _CURRENT, {"job": asked.job})
        if self._work is not work:
            self.tell(f"agreed to '{work.config.name}' (job {asked.job}): {_promise(work.config)}")
        self._work = work
        return Accepted(self.identity.name, digest)

    def _open(self, job: str, terms: str) -> Work:
        """Judge terms and load the model; nothing is loaded for terms that are refused."""
        config = accept(terms, self.own)
        problems = (*judge(self.policy, config), judge_model(self.policy, config.model.base))
        if any(problems):
            raise FedtuneError(
                f"the owner's policy does not allow: {'; '.join(filter(None, problems))}",
                hint="the owner decides: --policy", code=ExitCode.PRIVACY,
            )  # fmt: skip
        charged = [one.charge for one in promises(config)]
        config = within(self.policy, config)
        if [one.charge for one in promises(config)] != charged:
            raise FedtuneError(
                "the owner's limits would change what a round is charged as",
                hint="both ends must keep one account: ask for terms with another epsilon",
                code=ExitCode.PRIVACY,
            )  # fmt: skip
        folder = self._folder(job)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        worker = worker_for(config, folder)
        self._require_room_for_rows(config)
        for note in worker.federation.notes:
            self.tell(f"note: {note}")
        app = make_client_app(
            config, folder, party_of=self._party, agreed=digest_of(terms)
        )  # fmt: skip
        return Work(job, digest_of(terms), config, app, worker.fingerprint)

    def _require_room_for_rows(self, config: Config) -> None:
        """Refuse terms whose batches could overflow with as many rows as this owner may have.

        That a batch overflows would be seen, and would tell the number of rows. What is compared
        is a public bound: the policy's, or the number of rows rounded up to a power of two.
        """
        promise = example_promise(config)
        if promise is not None and not promise.holds(self.policy.rows_at_most or self.own.rows):
            raise FedtuneError(
                f"privacy.example.population={promise.settings.population} is too small for a "
                "batch of this owner's rows",
                hint="a larger population, or another batch size", code=ExitCode.PRIVACY,
            )  # fmt: skip

    def _again(self) -> Work:
        """Go on after a restart with what was agreed to, if today's policy still allows it."""
        current = self._read(self.home / _CURRENT)
        known = self._read(self._folder(current["job"]) / "terms.json") if current else None
        if not current or not known:
            raise FedtuneError(
                "nothing was agreed to here yet", hint="a run sends its terms first",
                code=ExitCode.CONFIG,
            )  # fmt: skip
        work = self._open(known["job"], known["terms"])
        self._admit(work)
        if self._roster is None and (self.home / _ROSTER).is_file():
            # Of before the restart: a secure sum needs to know who the others are.
            self._roster = decode((self.home / _ROSTER).read_bytes(), self.authority)
        self._work = work
        return work

    def _admit(self, work: Work) -> None:
        """Set the owner's cap, and see that the ledger has room for what is planned.

        Where the server adds the noise, this node cannot watch it: the whole plan is charged
        at once, before anything leaves, and no round beyond it is worked on.
        """
        central = work.config.privacy.client
        for promise in promises(work.config):
            account = self._account(promise)
            others, delta = self._elsewhere(work.job, account)
            cap = (self.policy.max_epsilon - others, delta)
            if not cap[0] > 0:
                raise FedtuneError(
                    f"{BUDGET}: runs with other promises spent epsilon {others:.4g} of "
                    f"{self.policy.max_epsilon:g}",
                    hint="the owner decides: --policy", code=ExitCode.BUDGET_EXHAUSTED,
                )  # fmt: skip
            account = self._capped(account, cap)
            by_server = promise.unit is Unit.CLIENT and central and central.noise_at == "server"
            if by_server:
                self._charge_plan(work, promise, account)

    def _capped(self, account: Account, cap: tuple[float, float]) -> Account:
        """Set the policy's cap, unless the owner set a smaller one by ``fedtune budget set``."""
        now = (account.epsilon, account.delta)
        if now == cap:
            return account
        chain = self.ledger.entries(account)
        last = next((one for one in reversed(chain) if one.kind == Kind.BUDGET), None)
        ours = last is None or last.detail.get("note") == _NOTE
        epsilon, delta = account.epsilon, account.delta
        looser = epsilon is not None and delta is not None and (cap[0] > epsilon or cap[1] > delta)
        if not ours and looser:
            return account
        return self.ledger.set_budget(account, *cap, actor=self.identity.name, note=_NOTE)

    def _charge_plan(self, work: Work, promise: Promise, account: Account) -> None:
        claim = Claim(
            job=work.job, round=0, attempt=0, event=promise.charge.event,
            count=promise.charge.count * promise.rounds, purpose="plan",
            detail={"noise": "at the server"}, limit=None,
        )  # fmt: skip
        if account.id and work.job in self.ledger.jobs(account):
            return
        try:
            self.ledger.release(self.ledger.reserve(account, claim))
        except FedtuneError as error:
            if error.code != ExitCode.BUDGET_EXHAUSTED:
                raise
            raise FedtuneError(
                f"{BUDGET}: {error}", hint=error.hint, code=ExitCode.BUDGET_EXHAUSTED
            ) from error

    def _elsewhere(self, job: str, account: Account) -> tuple[float, float]:
        """Return what other jobs spent in this text's other accounts, and the delta of each.

        A server chooses unit and relation, and each pair has an account of its own. Epsilons
        and deltas add up; a job's own promises are about the same releases, and do not.
        """
        accounts = [one for one in self.ledger.accounts() if one.dataset == account.dataset]
        spent = []
        for one in accounts:
            if one.id == account.id:
                continue
            jobs = [name for name in self.ledger.jobs(one) if name != job]
            if jobs:
                spent.append((one, jobs))
        delta = self.policy.max_delta / (1 + len(spent))
        total = 0.0
        for one, jobs in spent:
            groups: dict[Event, int] = {}
            for name in jobs:
                for event, count in self.ledger.groups(one, name).items():
                    groups[event] = groups.get(event, 0) + count
            charges = [Charge(event, count) for event, count in groups.items()]
            total += accounted(charges, delta, one.relation).epsilon
        return total, delta

    def _account(self, promise: Promise) -> Account:
        name = f"{self.own.dataset}/{self.own.name}"
        return self.ledger.account(name, promise.unit, promise.relation)

    def _trusted(self, tensors: Mapping[str, Any]) -> Roster:
        """Read the roster: signed by the authority, not older than the last, with this node."""
        found = tensors.get("roster")
        if found is None or found.dtype != np.uint8 or found.ndim != 1 or len(tensors) != 1:
            raise FedtuneError("the terms came without a roster", code=ExitCode.SIGNATURE)
        before = self._read(self.home / _SERIAL)
        least = int(before["serial"]) if before else 0
        data = found.tobytes()
        roster = decode(data, self.authority, least)
        mine = public_of(self.identity)
        if not any(one == mine for one in roster.members):
            raise FedtuneError(
                f"'{mine.name}' is not in the roster with this key", hint="fedtune keys enrol",
                code=ExitCode.SIGNATURE,
            )  # fmt: skip
        write_atomic(self.home / _ROSTER, data)
        write_json(self.home / _SERIAL, {"serial": roster.serial})
        return roster

    def _party(self, name: str) -> Party:
        def everybody() -> Mapping[str, Ed25519PublicKey]:
            return signers(self._roster) if self._roster else {}

        return Party(name, self.identity.signer, everybody, self.policy.min_cohort)

    def _folder(self, job: str) -> Path:
        return self.home / "runs" / job

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise FedtuneError(
                f"'{path}' cannot be read: {error}",
                hint="it is this node's own state; restore it from a backup",
                code=ExitCode.STORAGE,
            ) from error


def _promise(config: Config) -> str:
    made = promises(config)
    if not made:
        return "no privacy is promised"
    said = "; ".join(
        f"epsilon at most {promise.spent().epsilon:.3g} for each {promise.unit.value}, "
        f"delta {promise.delta:g}, {promise.rounds} rounds"
        for promise in made
    )
    return "; ".join((said, *(f"beside the update leaves {words}" for words in leaving(config))))

"""The round loop: cohort, broadcast, collect, check, aggregate, apply, evaluate, commit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedtune.adapters import Pair, Tensors
from fedtune.config import Config, TuningConfig
from fedtune.errors import ExitCode, FedtuneError
from fedtune.measure import Counts, add, scores
from fedtune.privacy.accounting import epsilon_of_rdp, rdp
from fedtune.privacy.events import Unit
from fedtune.privacy.plan import Promise, promises
from fedtune.privacy.rldp.sac import Transition
from fedtune.privacy.rldp.travel import MADE, cut_off, require_transitions
from fedtune.resources import memory_mb
from fedtune.server.aggregate import Cohort, exact_residual
from fedtune.server.asking import Epochs, Member, ask_members
from fedtune.server.books import Books
from fedtune.server.check import problem_of, problem_of_evaluation
from fedtune.server.checkpoint import State, latest, store
from fedtune.server.events import ClientDone, Outcome, RoundDone, RoundStarted, Watcher
from fedtune.server.learner import Learner, open_learner
from fedtune.server.link import Answer, Link, plain
from fedtune.server.members import Roll, cohort_of, gather
from fedtune.server.optimizer import step
from fedtune.server.poolkey import agreed_key
from fedtune.server.private import Central, PrivateSum
from fedtune.server.robust import Ballot, vote_of
from fedtune.server.run_folder import RunFolder
from fedtune.server.secure_round import Identities, Secure, SecureSum, open_secure
from fedtune.server.seeded import (
    add_histories,
    advance,
    begin,
    decode,
    draws,
    narrow,
    outside,
    widen,
)
from fedtune.server.tuned import Tuned
from fedtune.wire import BUDGET, REVEALED, Evaluation, Task, Update

__all__ = ["learning_rate", "run_rounds"]


@dataclass
class Round:
    """What one attempt at a round collected, before it counts."""

    cohort: Cohort | PrivateSum | Ballot | SecureSum
    row: dict[str, Any]
    private: bool = False
    clients: list[dict[str, Any]] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    histories: list[Tensors] = field(default_factory=list)
    lost: bool = False
    learner: Learner | None = None
    made: list[list[Transition]] = field(default_factory=list)

    def decisions(self) -> list[dict[str, Any]]:
        """Return what the clipping policy of a private sum chose, for the log."""
        if not isinstance(self.cohort, PrivateSum):
            return []
        return self.cohort.decisions()

    def problems(self) -> str:
        """Return why clients did not count, each reason once."""
        reasons = {entry["reason"]: entry for entry in self.clients if entry["reason"]}
        return "; ".join(f"{e['client']}: {reason}" for reason, e in list(reasons.items())[:3])


def run_rounds(
    link: Link, tuned: Tuned, folder: RunFolder, watch: Watcher, central: Central | None = None,
    books: Books | None = None, identities: Identities | None = None,
) -> State:  # fmt: skip
    """Run the federation from its last committed round to its end.

    Parameters
    ----------
    link : Link
    tuned : Tuned
    folder : RunFolder
        New, or that of a run to go on with.
    watch : callable
        Hears every event; it must not change anything.
    central : Central or None
        Keeps a promise of client-level privacy.
    books : Books or None
        The server's copy of what clients spend, where their ledgers are elsewhere.
    identities : callable or None
        Secure aggregation: returns everybody's public identity by name.

    Raises
    ------
    FedtuneError
        No client, another base model at a client, or too few answers
        (``ExitCode.QUORUM``). Committed rounds are kept.
    """
    config, job = tuned.config, folder.job()
    # A client charges an attempt once, so attempts of a lost session are not used again.
    once = config.privacy.on or config.federation.secure is not None
    first = folder.begin_session() * (config.federation.retries + 1) if once else 0
    state = latest(folder, tuned.fingerprint)
    members = gather(link, tuned, watch, Task(state.round if state else 0, 0, 0, 0.0, {}, job))
    folder.forget_after(state.round if state else -1)
    epochs = Epochs.at(members, state)
    learner = open_learner(config)
    if state is None:
        state = tuned.start()
        if tuned.weights is not None:
            state = begin(config, tuned.fingerprint, agreed_key(link, config, members, folder))
        if learner is not None:
            state = replace(state, learner=learner.start())
        row = {"round": 0, "memory_mb": memory_mb()} | _evaluated(
            link, tuned, state, members, epochs, job
        )
        _commit(folder, config, state, row, [], watch)
    bounds, roll = promises(config), Roll.of(members)
    secure = open_secure(config, folder, identities)
    while state.round < config.federation.rounds:
        folder.require_wanted()
        started = time.monotonic()
        begun = Task(state.round, 0, state.round, 0.0, {}, job)
        members = roll.present(link, tuned, watch, begun, epochs)
        asking = Asking(job, first, central, epochs, books, secure, learner)
        state, done = _one_round(link, tuned, state, members, watch, asking)
        row = done.row | _bounds(bounds, state.round, central)
        if _is_due(state.round, config):
            row |= _evaluated(link, tuned, state, members, epochs, job)
        row |= {"seconds": round(time.monotonic() - started, 3), "memory_mb": memory_mb()}
        folder.decided(state.round, done.decisions())
        _commit(folder, config, state, row, done.clients, watch)
    return state


def learning_rate(tuning: TuningConfig, number: int, rounds: int) -> float:
    """Return the clients' learning rate in round ``number`` of ``rounds``.

    Examples
    --------
    >>> [learning_rate(TuningConfig(lr=1.0, schedule="linear"), n, 4) for n in (1, 2, 4)]
    [1.0, 0.75, 0.25]
    """
    warm = tuning.warmup_rounds
    if number <= warm:
        return tuning.lr * number / (warm + 1)
    done = (number - warm - 1) / max(1, rounds - warm)
    shape: dict[str, Callable[[float], float]] = {
        "constant": lambda _: 1.0,
        "linear": lambda x: 1.0 - x,
        "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    }
    return tuning.lr * shape[tuning.schedule](done)


@dataclass(frozen=True)
class Asking:
    """What a round needs besides the state: whose it is, and who keeps its promise."""

    job: str
    first: int
    central: Central | None
    epochs: Epochs
    books: Books | None = None
    secure: Secure | None = None
    learner: Learner | None = None


def _one_round(
    link: Link, tuned: Tuned, state: State, members: tuple[Member, ...], watch: Watcher,
    asking: Asking,
) -> tuple[State, Round]:  # fmt: skip
    """Try a round until enough clients answer well."""
    federation, central = tuned.config.federation, asking.central
    # Under a promise about clients nothing may depend on who fails: one attempt, always
    # released, and who did not answer well adds zero.
    tries = 1 if central else federation.retries + 1
    for attempt in range(asking.first, asking.first + tries):
        summed = _shaped(tuned, state, central) if central else None
        reservation = central.reserve(state.round + 1) if central else None
        chosen = (
            central.draw(members) if central
            else list(cohort_of(members, tuned.config, state.round + 1, attempt))
        )  # fmt: skip
        if asking.books:
            asking.books.charge(state.round + 1, attempt, [member.client for member in chosen])
        done = _attempt(link, tuned, state, chosen, attempt, watch, asking, summed)
        needed = 0 if central else max(1, math.ceil(federation.quorum * len(chosen)))
        if done.cohort.count >= needed or done.lost:
            after = _apply(tuned, state, done)
            if central and reservation:
                central.ledger.release(reservation)
            return after, done
    if all(BUDGET in entry["reason"] for entry in done.clients) and done.clients:
        raise FedtuneError(
            f"round {state.round + 1}: no client's budget allows it ({done.problems()})",
            hint="the rounds before are kept; ask the owners: fedtune budget show",
            code=ExitCode.BUDGET_EXHAUSTED,
        )
    raise FedtuneError(
        f"round {state.round + 1}: {done.cohort.count} of {len(chosen)} clients answered well, "
        f"{needed} are needed ({done.problems()})",
        hint="lower tuning.lr where clients diverge, mend those that fail, or lower "
        "federation.quorum; the rounds before are kept: fedtune simulate --resume RUN",
        code=ExitCode.QUORUM,
    )


def _shaped(tuned: Tuned, state: State, central: Central) -> PrivateSum:
    """Return an empty sum, shaped by what the clipping policy saw of the rounds before."""
    given = narrow(tuned, state.adapter, state.round + 1)
    policy = central.policy(given, state.policy, tuned.utility(state))
    return central.sum(given, policy, state.round + 1)


def _attempt(
    link: Link, tuned: Tuned, state: State, chosen: list[Member], attempt: int, watch: Watcher,
    asking: Asking, summed: PrivateSum | None,
) -> Round:  # fmt: skip
    config, number, central = tuned.config, state.round + 1, asking.central
    lr = learning_rate(config.tuning, number, config.federation.rounds)
    every = config.output.checkpoint_every
    task = Task(number, attempt, state.round - state.round % every, lr, {}, asking.job)
    watch(RoundStarted(number, attempt, len(chosen)))
    started = time.monotonic()
    if asking.secure:
        return _secured(link, tuned, state, chosen, task, watch, asking, asking.secure)
    more = asking.learner.told(state.learner) if asking.learner else {}
    sizes, answers = ask_members(link, Update, tuned, state, chosen, task, asking.epochs, more)
    row = {"round": number, "attempt": attempt, "lr": lr, "bytes_down": sum(sizes.values())}
    vote = vote_of(config.federation.aggregation)
    plain_sum = Ballot(vote) if vote else Cohort(state.adapter, _pairs(tuned))
    done = Round(summed or plain_sum, row, private=config.privacy.on, learner=asking.learner)
    for member, answer in _in_order(chosen, answers):
        outcome, reason = _take(done, answer, task, state, tuned, member.client)
        up = answer.bytes_up if answer else 0
        done.clients.append(
            {
                "round": number, "client": member.client, "outcome": outcome, "reason": reason,
                "bytes_down": sizes.get(member.node, 0), "bytes_up": up,
                "seconds": round(time.monotonic() - started, 3),
            } | ({} if done.private else _facts(answer))
        )  # fmt: skip
        asking.epochs.heard(member.client, _epoch(state), well=outcome == "ok")
        watch(ClientDone(number, member.client, outcome, reason, up))
    outcomes = [entry["outcome"] for entry in done.clients]
    if central:
        # How many were drawn is the sampler's secret: clients.jsonl has it, at the server.
        del row["bytes_down"]
        return done
    row |= {f"clients_{kind}": outcomes.count(kind) for kind in ("ok", "late", "failed", "dropped")}
    row["bytes_up"] = sum(entry["bytes_up"] for entry in done.clients)
    if config.tuning.cut and not done.private:
        crossed = ("cut_up", "cut_down")
        row["bytes_cut"] = sum(entry.get(way, 0) for entry in done.clients for way in crossed)
    return done


def _secured(
    link: Link, tuned: Tuned, state: State, chosen: list[Member], task: Task, watch: Watcher,
    asking: Asking, secure: Secure,
) -> Round:  # fmt: skip
    """Try a round of which only the sum is seen."""
    row: dict[str, Any] = {"round": task.round, "attempt": task.attempt, "lr": task.lr}
    found, told = secure.sum(link, tuned, state, chosen, task, asking.epochs)
    done = Round(found, row, private=tuned.config.privacy.on)
    for member in chosen:
        one = told[member.client]
        done.clients.append(
            {"round": task.round, "client": member.client, "outcome": one.outcome,
             "reason": one.reason, "bytes_down": one.bytes_down, "bytes_up": one.bytes_up}
        )  # fmt: skip
        asking.epochs.heard(member.client, _epoch(state), well=one.outcome == "ok")
        watch(ClientDone(task.round, member.client, one.outcome, one.reason, one.bytes_up))
    outcomes = [entry["outcome"] for entry in done.clients]
    # Their masks came off for a sum that died with the server: the round is over without one.
    lost = sum(entry["reason"].startswith(REVEALED) for entry in done.clients)
    done.lost = not found.count and lost > 0 and lost * 2 > len(chosen)
    if not asking.central:
        kinds = ("ok", "late", "failed", "dropped")
        row |= {f"clients_{kind}": outcomes.count(kind) for kind in kinds}
        row |= {way: sum(entry[way] for entry in done.clients) for way in
                ("bytes_down", "bytes_up")}  # fmt: skip
    return done


def _in_order(
    chosen: list[Member], answers: Iterator[Answer[Update]]
) -> Iterator[tuple[Member, Answer[Update] | None]]:
    """Yield answers in the order of the clients, as early as that order allows."""
    place = {member.node: i for i, member in enumerate(chosen)}
    early: dict[int, Answer[Update]] = {}
    head = 0
    for answer in answers:
        early[place[answer.node]] = answer
        while head in early:
            yield chosen[head], early.pop(head)
            head += 1
    for position in range(head, len(chosen)):
        yield chosen[position], early.pop(position, None)


def _take(
    done: Round, answer: Answer[Update] | None, task: Task, state: State, tuned: Tuned,
    client: str,
) -> tuple[Outcome, str]:  # fmt: skip
    """Add one answer to the round if it may count; say what became of it."""
    config = tuned.config
    if answer is None:
        return "late", f"no answer within {config.federation.deadline:g} s"
    if answer.value is None:
        return "failed", answer.problem
    update, history = answer.value, {}
    if config.tuning.seeded:
        try:
            update = decode(update, config)
        except (FedtuneError, ValueError, TypeError, IndexError) as error:
            return "dropped", plain(str(error))
        history = draws(update)
        update = replace(update, tensors={n: update.tensors[n] for n in state.adapter})
        if outside(tuned, state, client, task.round, update.tensors):
            return "dropped", "has coefficients outside the directions of its group"
    made: list[Transition] = []
    if done.learner is not None:
        rest, given = cut_off(MADE, update.tensors)
        try:
            made = require_transitions(given, done.learner.most)
        except FedtuneError as error:
            return "dropped", plain(str(error))
        update = replace(update, tensors=rest)
    if reason := problem_of(update, task, state.adapter, private=done.private):
        return "dropped", reason
    weight = update.examples if config.federation.weighting == "examples" else 1
    delta = update.tensors
    if isinstance(done.cohort, PrivateSum):
        delta = narrow(tuned, delta, task.round)
    if not isinstance(done.cohort, SecureSum):
        done.cohort.add(float(weight), delta)
    done.histories.append(history)
    done.made.append(made)
    if not done.private:
        done.losses.append((weight, update.loss))
    return "ok", ""


def _facts(answer: Answer[Update] | None) -> dict[str, Any]:
    if answer is None or answer.value is None:
        return {}
    names = ("examples", "steps", "truncated", "loss")
    cut = ("kept", "cut_up", "cut_down") if answer.value.cut_up else ()
    return {name: getattr(answer.value, name) for name in (*names, *cut)}


def _apply(tuned: Tuned, state: State, done: Round) -> State:
    """Turn the cohort's mean into the next state, and note how exact it is."""
    settings = tuned.config.federation
    policy = state.policy
    if isinstance(done.cohort, SecureSum):
        mean = done.cohort.release()
    elif isinstance(done.cohort, PrivateSum):
        mean = widen(tuned, done.cohort.release(), state.round + 1)
        policy = done.cohort.policy.state()
    else:
        mean = done.cohort.mean()
    adapter, moments = step(settings.server_optimizer, state.adapter, mean, state.moments)
    total = sum(weight for weight, _ in done.losses)
    if total:
        done.row["train_loss"] = sum(weight * loss for weight, loss in done.losses) / total
    # safetensors gives names in any order; a sum of floats must not depend on it.
    squares = math.fsum(float(np.square(v, dtype=np.float64).sum()) for v in mean.values())
    done.row["update_norm"] = math.sqrt(squares)
    averaged = {name: state.adapter[name] + mean[name] for name in mean}
    # Of single updates, so under client-level privacy nobody may know it.
    if _pairs(tuned) and isinstance(done.cohort, Cohort):
        done.row["aggregation_error"] = done.cohort.relative_error(averaged)
    learner = done.learner.learn(state.learner, done.made) if done.learner else state.learner
    residual = state.residual
    if settings.aggregation == "fedex" and isinstance(done.cohort, Cohort):
        missing = done.cohort.missing(averaged)
        residual, lost = exact_residual(residual, missing, settings.residual_rank)
        done.row["residual_lost"] = lost
    after = replace(
        state, round=state.round + 1, adapter=adapter, residual=residual, moments=moments,
        policy=policy, learner=learner, history=add_histories(state.history, done.histories),
    )  # fmt: skip
    return advance(tuned.config, state, after) if tuned.weights is not None else after


def _pairs(tuned: Tuned) -> tuple[Pair, ...]:
    """Return the products to follow: coefficients of a pool average exactly."""
    return () if tuned.weights is not None else tuned.pairs


def _epoch(state: State) -> int:
    return state.chain.epoch if state.chain else 0


def _bounds(bounds: tuple[Promise, ...], number: int, central: Central | None) -> dict[str, float]:
    """Return what the rounds so far cost at most, by the accountant that takes no time.

    At client level the ledger says how often; at example level it is with the clients,
    and this is the cost of one attempt in each round.
    """
    found = {}
    for promise in bounds:
        charge = promise.charge
        groups = {charge.event: charge.count * number}
        if central is not None and promise.unit is Unit.CLIENT:
            groups = central.ledger.groups(central.account, central.job)
        # Not 0.0 times it: where an order has no bound that is not a number.
        none = np.zeros_like(rdp(promise.mechanism.event, promise.relation))
        cost = sum((n * rdp(event, promise.relation) for event, n in groups.items()), start=none)
        found[f"epsilon_{promise.unit.value}"] = epsilon_of_rdp(cost, promise.delta)[0]
    return found


def _is_due(number: int, config: Config) -> bool:
    return number % config.evaluation.every == 0 or number == config.federation.rounds


def _evaluated(
    link: Link, tuned: Tuned, state: State, members: tuple[Member, ...], epochs: Epochs, job: str
) -> dict[str, Any]:
    """Measure a state: on the federation's held-out file, and on each client's own rows."""
    config = tuned.config
    limit = 0 if config.federation.secure else config.evaluation.clients
    asked = list(members) if limit < 0 else list(members[:limit])
    found: dict[str, Any] = {}
    parts: dict[str, Counts] = {}
    if asked:
        task = Task(state.round, 0, state.round, 0.0, {}, job)
        nodes = {member.node: member.client for member in asked}
        sizes, answers = ask_members(link, Evaluation, tuned, state, asked, task, epochs)
        found["bytes_evaluation"] = sum(sizes.values())
        for answer in answers:
            found["bytes_evaluation"] += answer.bytes_up
            value = answer.value
            if value is None or problem_of_evaluation(value, task, len(tuned.labels)):
                continue
            if value.units:
                parts[nodes[answer.node]] = value.counts()
        found["clients_evaluated"] = len(parts)
        found |= _spread([scores(parts[name]) for name in sorted(parts)], config)
    whole = tuned.evaluate(state) or add(parts[name] for name in sorted(parts))
    return found | scores(whole)


def _spread(each: list[dict[str, float]], config: Config) -> dict[str, float]:
    """Return mean, worst and the tenth from the bad end of the clients' main score."""
    if not each:
        return {}
    better_is_more = config.model.task == "classification"
    values = np.array([one["accuracy" if better_is_more else "loss"] for one in each])
    return {
        "client_mean": float(values.mean()),
        "client_worst": float(values.min() if better_is_more else values.max()),
        "client_p10": float(np.percentile(values, 10 if better_is_more else 90)),
    }


def _commit(
    folder: RunFolder, config: Config, state: State, row: dict[str, Any],
    clients: list[dict[str, Any]], watch: Watcher,
) -> None:  # fmt: skip
    """Record first, then checkpoint: a crash between the two loses neither."""
    folder.append(row, clients)
    due = state.round % config.output.checkpoint_every == 0
    if due or state.round == config.federation.rounds:
        store(folder, state, config.output.keep_checkpoints)
    watch(RoundDone(state.round, row))

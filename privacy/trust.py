"""Who is protected against whom: the words of a report, for each way to add noise.

One row for each pair of unit and place of the noise. A pair without a row is not
something a report may promise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import Relation, Unit
from fedtune.privacy.facts import Facts, Omission, Ran
from fedtune.privacy.words import plural, power

__all__ = ["Trust", "condition", "formal", "omissions", "trust_of", "unit_words"]


@dataclass(frozen=True)
class Trust:
    """One row of the table of units, mechanisms and adversaries.

    Attributes
    ----------
    title : str
    model : str
        Who adds the noise, and whom that asks to be trusted.
    leaks : str
        What is bounded, as the start of a sentence.
    bounded_for : tuple of str
        Who learns no more than the bound.
    unbounded_for : tuple of str
        Against whom there is no bound.
    beyond : tuple of str
        What the bound is not about, or where it grows.
    """

    title: str
    model: str
    leaks: str
    bounded_for: tuple[str, ...]
    unbounded_for: tuple[str, ...]
    beyond: tuple[str, ...]


_TRUST = {
    (Unit.EXAMPLE, "client"): Trust(
        title="One example of one client",
        model="Local. Every client clips, adds its own noise and only then sends. "
        "The server need not be trusted with the text.",
        leaks="Whether any one example was trained on, and what it said",
        bounded_for=(
            "the server",
            "the other clients",
            "everybody who gets the model",
            "whoever reads messages on the network",
        ),
        unbounded_for=("the client itself (it holds the text)", "whoever breaks into it"),
        beyond=(
            "A person with several examples: the bound grows, see the group table.",
            "An example that stands at several clients: their bounds compose.",
            "What many examples have in common is learnt; that is the purpose of training.",
        ),
    ),
    (Unit.CLIENT, "server"): Trust(
        title="Everything of one client",
        model="Central. The server adds the noise, after it has added up the clients' updates. "
        "The server is trusted.",
        leaks="Whether any one client took part, and anything about all of its text",
        bounded_for=("the other clients", "everybody who gets the model"),
        unbounded_for=(
            "the server (it sees each update before the noise)",
            "whoever reads updates in the server or on their way to it",
        ),
        beyond=(
            "A person who stands behind several clients: the bound grows, see the group table.",
            "What many clients have in common is learnt; that is the purpose of training.",
        ),
    ),
}

_TRUST[Unit.CLIENT, "clients"] = Trust(
    title="Everything of one client",
    model="Distributed. Every client adds a share of the noise, and secure aggregation shows the "
    "server nothing but the noisy sum. The noise of {honest} alone keeps the bound.",
    leaks="Whether any one client's text was used, and anything about all of it",
    bounded_for=(
        "the server, also when it does not follow the protocol",
        "{others}",
        "everybody who gets the model",
        "whoever reads messages on the network",
    ),
    unbounded_for=(
        "the client itself (it holds the text), and whoever breaks into it",
        "{knowing}",
        "a server together with so many clients that fewer than {honest} are left in a sum",
        "whoever holds the federation's authority and enrols clients that do not exist",
    ),
    beyond=(
        "A person who stands behind several clients: the bound grows, see the group table.",
        "What many clients have in common is learnt; that is the purpose of training.",
    ),
)

_OMITTED = (
    Omission(what="Time, size and number of messages", why="nothing hides them"),
    Omission(
        what="Which clients were asked in a round, and which answered",
        why="whoever watches the network may see it; so may readers of the operator's logs",
    ),
    Omission(
        what="Logs, traces and error messages at the operator",
        why="they stay in the run folder; they are not part of the result",
    ),
    Omission(
        what="The base model and the text it was pretrained on",
        why="it was there before; no noise was added for it",
    ),
    Omission(
        what="Held-out text that the operator gave for evaluation",
        why="it counts as public",
    ),
    Omission(
        what="The nominal number of units, the settings and the schedule",
        why="they are public constants, fixed in advance",
    ),
)

_METRICS = {
    "withheld": Omission(
        what="Loss, accuracy and other measurements on clients' text",
        why="none were taken, or none left the client",
    ),
    "not-private": Omission(
        what="Loss, accuracy and other measurements on clients' text",
        why="exact, not private, and covered by no bound; they must stay with the operator",
    ),
}


def trust_of(ran: Ran, *, split: bool = False) -> Trust:
    """Return who is protected against whom.

    Parameters
    ----------
    ran : Ran
    split : bool
        The model was cut: another server runs its body, and is none of the protected.

    Raises
    ------
    FedtuneError
        For a unit that is not protected by noise added there.
    """
    found = _TRUST.get((ran.unit, ran.noised_by))
    if found is None:
        raise FedtuneError(
            f"no statement for unit='{ran.unit.value}' with noise added by the {ran.noised_by}",
            hint="examples are protected by noise at the client, clients by noise at the server or "
            "at all clients",
            code=ExitCode.PRIVACY,
        )
    if ran.noised_by == "clients":
        found = _counted(found, plural(ran.honest or 1, "honest client"), ran.colluding)
    return _cut(found) if split else found


def _counted(trust: Trust, honest: str, colluding: int) -> Trust:
    """Return the row with the numbers of clients that it counts on.

    A client whose share is in a sum knows that share: against it only the others' noise counts.
    """
    others = f"{plural(colluding, 'other client')}, also together with the server"
    known = "another client whose share of the noise is in a sum (it knows its own)"
    words = {
        "{honest}": honest,
        "{others}": others if colluding else "",
        "{knowing}": "" if colluding else known,
    }

    def filled(text: str) -> str:
        for mark, word in words.items():
            text = text.replace(mark, word)
        return text

    return replace(
        trust, model=filled(trust.model),
        bounded_for=tuple(who for who in map(filled, trust.bounded_for) if who),
        unbounded_for=tuple(who for who in map(filled, trust.unbounded_for) if who),
    )  # fmt: skip


def _cut(trust: Trust) -> Trust:
    """Return the row for a split model: what goes through the cut is another ledger's."""
    updates, network = "the server that collects the updates", "whoever reads messages"
    return replace(
        trust,
        model=trust.model.replace(
            "The server need not be trusted with the text.",
            "The server that collects the updates need not be trusted with the text; the one "
            "that runs the body must be.",
        ),
        bounded_for=tuple(
            updates if who == "the server" else who
            for who in trust.bounded_for
            if not who.startswith(network)
        ),
        unbounded_for=(
            *trust.unbounded_for,
            "the server that runs the body (it has a ledger of its own)",
            "whoever reads what goes through the cut",
        ),
    )


def omissions(facts: Facts) -> tuple[Omission, ...]:
    """Return what no statement covers: what holds for every run, then this run's own."""
    metrics = _METRICS.get(facts.metrics)
    return (*((metrics,) if metrics else ()), *facts.not_covered, *_OMITTED)


def unit_words(ran: Ran) -> str:
    """Return the unit, as part of a sentence."""
    return "one example of one client" if ran.unit is Unit.EXAMPLE else "all data of one client"


def formal(ran: Ran, epsilon: str, rounds: int, pure: str = "", *, split: bool = False) -> str:
    """Return the one sentence that is the guarantee.

    Parameters
    ----------
    epsilon : str
        As printed; empty when there is no bound.
    rounds : int
        How many rounds released something.
    pure : str
        Epsilon at delta 0, as printed; empty when there is none.
    split : bool
        The model was cut: of what leaves a client only its updates are meant.
    """
    if ran.relation is Relation.ADD_OR_REMOVE_ONE:
        differ = f"that differ by {unit_words(ran)} being there or not"
    else:
        differ = (
            f"that are equal but for {unit_words(ran)}, which counts as zero in one of them "
            "(how many there are is public)"
        )
    leaves = (
        "what leaves any one client to be aggregated in"
        if split
        else ("what leaves any one client in")
    )
    what = leaves if ran.unit is Unit.EXAMPLE else "the sequence of released models of"
    subject = f"{what} all {plural(rounds, 'round')} together"
    if not epsilon:
        return f"For any two data sets {differ}: {subject} has no bound (epsilon is infinite)."
    also = f", and with ε = {pure} and δ = 0" if pure else ""
    return (
        f"For any two data sets {differ}, {subject} is (ε, δ)-differentially private "
        f"with ε = {epsilon} and δ = {power(ran.delta)}{also}."
    )


def condition(ran: Ran, bounded: bool = True) -> str:
    """Return in words what the smaller, amplified bound rests on; empty without sampling.

    ``bounded`` says whether there is a bound without it.
    """
    if ran.sampling.scheme == "everyone" or ran.sampling.probability >= 1.0:
        return ""
    unit = "example" if ran.unit is Unit.EXAMPLE else "client"
    often = "step" if ran.unit is Unit.EXAMPLE else "round"
    who = ran.sampling.flipped_by
    seen = (
        f"nobody but the {who} learns which examples were drawn"
        if ran.unit is Unit.EXAMPLE
        else f"nobody but the {who} learns which clients were drawn: not from the network, "
        "not from logs (a client may know of itself)"
    )
    cap = (
        f" At most {ran.sampling.cap:,} are kept, at random."
        if ran.sampling.scheme == "truncated-poisson"
        else ""
    )
    otherwise = (
        "the bound without sampling holds."
        if bounded
        else "nothing is stated: the filter that chose the noise counted on sampling."
    )
    return (
        f"The smaller bound counts on secret sampling. In every {often} each {unit} takes part "
        f"by an independent coin, flipped by the {who}.{cap} It holds while {seen}. Against "
        f"somebody who does learn it, {otherwise}"
    )

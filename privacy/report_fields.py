"""The mechanism that ran, row by row, and the fields that three guides ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from fedtune.privacy.events import (
    Event,
    Gaussian,
    Laplace,
    Levels,
    PoissonGaussian,
    PoissonLaplace,
    Relation,
    RenyiFiltered,
    TruncatedPoissonGaussian,
    Unbounded,
    Unit,
    least_noise,
)
from fedtune.privacy.facts import Facts, Ran
from fedtune.privacy.statement import Statement
from fedtune.privacy.trust import omissions, trust_of
from fedtune.privacy.words import above, joined, plural, power, shown, tidy

__all__ = ["GUIDES", "SEARCHING", "Named", "event_words", "fields_of", "ran_rows"]

GUIDES = ("How to DP-fy ML, 5.3.3", "NIST SP 800-226", "OpenDP registry, tier 3")
"""Ponomareva et al. 2023 (arXiv 2303.00654); Near et al. 2025; registry.opendp.org."""

_NOT_STATED = "not stated"
_RELATION = {
    Relation.ADD_OR_REMOVE_ONE: "add or remove one (how many there are is private)",
    Relation.REPLACE_SPECIAL: "one counts as zero (how many there are is public)",
}
_CLIP = {
    "flat": "one L2 norm over a whole contribution",
    "per-adapter": "one L2 norm per adapter, jointly bounded",
    "automatic": "automatic: every contribution is scaled to the norm",
    "quantile": "adapted to a quantile; its bits are noised in the same release",
    "quantile-per-adapter": "one L2 norm per adapter, each adapted to a quantile; its bits are "
    "noised in the same release",
    "closed-form": "one L2 norm per adapter, each adapted to a quantile, and the shares of the "
    "noise that add least of it",
    "dp-lac": "one L2 norm, looked for with noised bits in the first releases, then following "
    "released gradients",
    "geoclip": "one L2 norm over coordinates that are scaled by released gradients",
    "random": "norms and shares of the noise moved at random",
    "constant": "norms and shares of the noise moved by one action again and again",
    "rldp": "norms and shares of the noise chosen by a learning controller",
}
SEARCHING = ("dp-lac", "random", "constant")
"""Policies that have sensors in the first releases only."""

_NAMES = {"pld": "privacy loss distribution", "rdp": "Renyi", "analytic": "analytic Gaussian"}


class Named(BaseModel):
    """One thing to state, under the name that each guide has for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dp_fy: str
    nist: str
    opendp: str
    value: str


def ran_rows(ran: Ran, statement: Statement, groups: Mapping[Event, int]) -> tuple[
    tuple[str, str], ...
]:  # fmt: skip
    """Return the mechanism as it ran, from facts and from the worst account's events."""
    example = ran.unit is Unit.EXAMPLE
    clip = f"{_CLIP[ran.clip.rule]}, {tidy(ran.clip.norm)}"
    if ran.clip.policy is not None or ran.clip.rule == "quantile":
        clip += " at the start"
    if ran.clip.note:
        clip += f" ({shown(ran.clip.note)})"
    least = "at least " if _moves(ran, groups) else ""
    law = "Laplace, scale" if ran.noise.law == "laplace" else "Gaussian,"
    noise = (
        f"{law} {least}{tidy(ran.noise.multiplier)} times the sensitivity on each coordinate "
        f"of the sum, from {shown(ran.noise.source)}"
    )
    if not ran.noise.secure:
        noise += " (INSECURE: seeded)"
    lattice = ""
    if ran.noise.grid is not None:
        lattice = f"sums and noise are whole multiples of {ran.noise.grid:.3g}"
        lattice += " at the start, as the norm is" if ran.clip.policy is not None else ""
        if ran.noise.margin is not None:
            lattice += f"; rounding may add {ran.noise.margin:.2%} to the sensitivity, and "
            lattice += "the noise is that much larger"
    often = f"{plural(ran.rounds, 'round')}, " + (
        f"up to {plural(ran.steps_per_round, 'step')} each"
        if example
        else f"{plural(ran.steps_per_round, 'release')} each"
    )
    rows = [
        ("Unit", f"{'one example of one client' if example else 'everything of one client'}; "
         f"public nominal number: {ran.units:,}{' per client' if example else ''}"),
        ("Neighbouring data sets", _RELATION[ran.relation]),
        ("Sampler that ran", _sampler(ran, groups)),
        ("Clip", clip),
        ("Policy", policy_words(ran)),
        ("Sensors", _sensors(ran)),
        ("Noise", noise),
        ("Lattice", lattice),
        ("Denominator", f"{tidy(ran.denominator)}, a public constant"),
        ("Length", often),
        ("Charged in the ledger", joined([event_words(e, n) for e, n in groups.items()])),
        ("Accountant", accountant_words(statement)),
        ("Target", f"epsilon {ran.target_epsilon:g}" if ran.target_epsilon else ""),
        ("Delta", f"{power(ran.delta)}, below 1/{ran.units:,}"),
    ]  # fmt: skip
    return tuple((name, value) for name, value in rows if value)


def policy_words(ran: Ran) -> str:
    """Return what a clipping policy saw, in one sentence; empty where nothing moved."""
    policy = ran.clip.policy
    if policy is None:
        return ""
    mode = f" ({policy.mode})" if policy.mode else ""
    return (
        f"{ran.clip.rule}{mode}: it saw nothing but released values and public settings, so "
        "epsilon is that of the mechanism, whatever it chose"
    )


def _sensors(ran: Ran) -> str:
    """Return what the policy took of each release."""
    policy = ran.clip.policy
    if policy is None:
        return ""
    given = (("clip bits", policy.bits), ("a clamped mean loss", policy.loss))
    parts = [f"{name} {100.0 * share:.3g}%" for name, share in given if share]
    start = " at the start" if ran.clip.rule in SEARCHING else ""
    text = "none but released gradients"
    if parts:
        text = (
            f"{100.0 * policy.sensing:.3g}% of the privacy of each release{start} "
            f"({joined(parts)}); the gradient had {(1.0 - policy.sensing) ** -0.5 - 1.0:.2%} more "
            "noise for it"
        )
    if policy.held_out:
        text += (
            f". {100.0 * policy.held_out:.3g}% of the units, by a hash of each, trained nothing; "
            "their mean loss was in the same release, and no unit is in both parts"
        )
    return text


def accountant_words(statement: Statement) -> str:
    """Return which accountant gave the bound, and what the others said."""
    if statement.accountant not in _NAMES:
        return f"{statement.library}: no bound"
    parts = [f"Renyi {above(statement.epsilon_rdp, 3)} (order {tidy(statement.order)})"]
    if statement.epsilon_pld is not None:
        parts.insert(0, f"privacy loss distribution {above(statement.epsilon_pld, 3)}")
    if statement.accountant == "analytic":
        parts.insert(0, f"analytic Gaussian {above(statement.epsilon, 3)}")
    return f"{statement.library}: {', '.join(parts)}; the smallest valid bound counts"


def event_words(event: Event, count: int) -> str:
    """Return an event and its count as people say it.

    Examples
    --------
    >>> event_words(PoissonGaussian(0.02, 1.1), 400)
    '400 times Poisson 0.02 with noise 1.1'
    """
    match event:
        case Gaussian(z):
            what = f"Gaussian with noise {tidy(z)}"
        case PoissonGaussian(q, z):
            what = f"Poisson {tidy(q)} with noise {tidy(z)}"
        case TruncatedPoissonGaussian(q, z, population, cap):
            what = f"Poisson {tidy(q)} of {population:,}, at most {cap:,}, with noise {tidy(z)}"
        case Laplace(z):
            what = f"Laplace with noise {tidy(z)}"
        case PoissonLaplace(q, z):
            what = f"Poisson {tidy(q)} with Laplace noise {tidy(z)}"
        case Levels(q, noises, counts):
            pairs = zip(noises, counts, strict=True)
            levels = joined([f"{tidy(n)} with noise {tidy(z)}" for z, n in pairs])
            drawn = f"Poisson {tidy(q)}" if q < 1.0 else "Gaussian"
            what = f"{drawn} in an order chosen on the way ({levels})"
        case RenyiFiltered(order, divergence):
            what = f"a filter of Renyi order {tidy(order)} with budget {tidy(divergence)}"
        case Unbounded(reason):
            what = f"something without a bound ({shown(reason, 120)})"
    return f"{tidy(count)} times {what}"


def _moves(ran: Ran, groups: Mapping[Event, int]) -> bool:
    """Say whether releases had more noise than the least, which the facts have."""
    least = ran.noise.multiplier * (1 + 1e-9)
    return any(
        isinstance(event, Levels | RenyiFiltered) or (least_noise(event) or 0.0) > least
        for event in groups
    )


def _sampler(ran: Ran, groups: Mapping[Event, int]) -> str:
    sampling = ran.sampling
    unit, often = ("example", "step") if ran.unit is Unit.EXAMPLE else ("client", "round")
    if sampling.scheme == "everyone":
        return f"none: every {unit} in every {often}, no credit for sampling"
    drawn = {
        event.sampling_probability
        for event in groups
        if isinstance(event, PoissonGaussian | TruncatedPoissonGaussian | PoissonLaplace | Levels)
    }
    chance = joined([tidy(q) for q in sorted(drawn)]) or tidy(sampling.probability)
    text = f"Poisson: each {unit} in each {often} by its own coin of probability {chance}"
    if sampling.cap is not None:
        text += f", at most {sampling.cap:,} of {sampling.population or ran.units:,}"
    text += f"; coins flipped by the {sampling.flipped_by}"
    if sampling.source:
        text += f", from {shown(sampling.source)}"
    return text + ("" if sampling.secure else " (INSECURE: seeded)")


def fields_of(facts: Facts, statements: Sequence[Statement]) -> tuple[Named, ...]:
    """Return what the three guides ask to state, with this run's answers.

    The names are ours where a guide gives a topic and no name.
    """
    pairs = list(zip(facts.mechanisms, statements, strict=True))
    split = facts.crossing is not None
    who = facts.deployment
    rows = [
        ("DP setting", "Trust model", "Deployment model",
         " ".join(f"{s.title}: {trust_of(r, split=split).model}" for r, s in pairs)),
        ("Unit of privacy", "Unit of privacy", "Privacy unit, in detail",
         " ".join(f"{s.title}; {plural(facts.per_person, 'unit')} per person at most."
                  for _, s in pairs)),
        ("Adjacency definition", "Bounded or unbounded", "Flavour of DP",
         " ".join(f"{s.title}: (epsilon, delta), {_RELATION[r.relation]}." for r, s in pairs)),
        ("Formal statement of the model", "Epsilon and delta", "Privacy loss parameters",
         " ".join(s.formal for s in statements)),
        ("Data accesses covered", "Privacy budget, composition", "Accounting: composition",
         "Every release of this job, also of failed and repeated rounds; other jobs on the same "
         "data are listed with what all of them cost together."),
        ("Final mechanism output", "Query or model that is released", "Data product",
         f"{'; '.join(map(shown, facts.covered))}. {shown(who.product)}".strip()),
        ("Type of accounting", "Composition", "Accounting: composition",
         " ".join(f"{s.title}: {accountant_words(s)}." for s in statements)),
        ("Accounting assumptions, and whether they hold", "Algorithms and correctness",
         "Implementation",
         " ".join(s.condition or f"{s.title}: no sampling is assumed." for s in statements)),
        ("Statement for the tuning", "Composition", "Accounting: composition",
         f"{shown(facts.tuning.how)}. " + (
             "All runs on this data are in the ledger." if facts.tuning.private
             else "Runs outside the ledger are not covered.")),
        ("Post-processing", "Post-processing", "Accounting: post-processing",
         "Averaging, optimisers and merging use released values only."),
        ("Transparency and verifiability", "Implementation", "Implementation and security",
         f"Open source; {joined([f'{k} {v}' for k, v in sorted(facts.versions.items())])}. "
         "Noise from the operating system's entropy by AES-256-CTR, on a lattice."
         if all(r.noise.secure for r in facts.mechanisms) else
         "Open source. The noise was seeded and is not secure."),
        ("", "Side channels", "Unprotected quantities",
         "; ".join(shown(o.what) for o in omissions(facts)) + "."),
        ("", "Security and access control", "Implementation and security",
         "This report is signed (Ed25519); the ledger is a chain of hashes. Access to run "
         "folder, ledger and clients is the operator's to control."),
        ("", "Data collection exposure", "Data domain",
         f"{shown(facts.data.description)}; {plural(facts.data.clients, 'client')}. "
         f"{shown(facts.data.partition)}. Duplicates: {shown(facts.data.duplicates)}."),
        ("", "Utility and bias", "Rationale",
         shown(who.rationale) or f"{_NOT_STATED}; utility is in the run's metrics"),
        ("", "", "Curator, intended use, date",
         f"{shown(who.curator) or 'curator ' + _NOT_STATED}; "
         f"{shown(who.purpose) or 'use ' + _NOT_STATED}; {facts.finished[:10]}; "
         f"{shown(who.contact) or 'contact ' + _NOT_STATED}"),
    ]  # fmt: skip
    if any(not math.isfinite(s.epsilon) for s in statements):
        rows.insert(0, ("", "", "", "Something was released that nothing bounds."))
    return tuple(
        Named(dp_fy=a, nist=b, opendp=c, value=value[:1].upper() + value[1:])
        for a, b, c, value in rows
    )

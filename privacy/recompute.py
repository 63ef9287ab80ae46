"""The three lines with which anybody gets the printed epsilon from the printed ledger.

They use ``dp_accounting`` as it is on the registry and nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.privacy.accounting import Spent
from fedtune.privacy.bounds import ORDERS
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
)

__all__ = ["FILE", "lines"]

FILE = "report.json"
"""The file that the lines read: ``fedtune report RUN --format json --out report.json``."""

_Z_NAME = "noise_multiplier"
_Z = f'g["event"]["{_Z_NAME}"]'
_Q = 'g["event"]["sampling_probability"]'
_ZS, _NS = 'g["event"]["noise_multipliers"]', 'g["event"]["counts"]'
_D = 'g["event"]["divergence"]'
_MAKE = {
    Gaussian: f"dp.GaussianDpEvent({_Z})",
    PoissonGaussian: f"dp.PoissonSampledDpEvent({_Q}, dp.GaussianDpEvent({_Z}))",
    Laplace: f"dp.LaplaceDpEvent({_Z})",
    PoissonLaplace: f"dp.PoissonSampledDpEvent({_Q}, dp.LaplaceDpEvent({_Z}))",
    Levels: f"dp.ComposedDpEvent([dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent({_Q}, "
    f"dp.GaussianDpEvent(z)), n) for z, n in zip({_ZS}, {_NS})])",
    TruncatedPoissonGaussian: "dp.dp_event.TruncatedSubsampledGaussianDpEvent("
    f'g["event"]["population"], {_Q}, g["event"]["cap"], {_Z})',
}
_KIND = {
    Gaussian: "gaussian",
    PoissonGaussian: "poisson-gaussian",
    Laplace: "laplace",
    PoissonLaplace: "poisson-laplace",
    Levels: "levels",
}
_DEFAULT_GRID = 1e-4


def lines(index: int, groups: Mapping[Event, int], spent: Spent, relation: Relation) -> str:
    """Return Python that prints epsilon of one account; empty when it has no bound.

    Parameters
    ----------
    index : int
        Place of the account in the report's ledger extract.
    groups : mapping of Event to int
        Its events.
    spent : Spent
        What is printed for them.
    relation : Relation

    Examples
    --------
    >>> from fedtune.privacy.accounting import spent
    >>> groups, relation = {PoissonGaussian(0.01, 1.0): 1000}, Relation.ADD_OR_REMOVE_ONE
    >>> len(lines(0, groups, spent(groups, 1e-5, relation), relation).splitlines())
    4
    """
    if not groups or any(isinstance(event, Unbounded) for event in groups):
        return ""
    start = [
        "import json, dp_accounting as dp",
        f'groups = json.load(open("{FILE}"))["report"]["ledger"]["accounts"][{index}]["groups"]',
    ]
    if any(isinstance(event, RenyiFiltered) for event in groups):
        return "\n".join([*start, *_filtered(groups, spent, relation)])
    if spent.accountant == "analytic":
        each = f'g["count"] / {_Z} ** 2'
        if any(isinstance(event, Levels) for event in groups):
            levels = f"sum(n / z ** 2 for z, n in zip({_ZS}, {_NS}))"
            each = f'{each} if "{_Z_NAME}" in g["event"] else g["count"] * {levels}'
        total = f"sum({each} for g in groups) ** -0.5"
        return "\n".join([*start, f"print(dp.get_epsilon_gaussian({total}, {spent.delta!r}))"])
    start.append(
        f'event = dp.ComposedDpEvent([dp.SelfComposedDpEvent({_made(groups)}, g["count"]) '
        "for g in groups])"
    )
    asked = ", ".join(_accountants(groups, spent, relation))
    end = f"print(min(a.compose(event).get_epsilon({spent.delta!r}) for a in [{asked}]))"
    return "\n".join([*start, end])


def _filtered(groups: Mapping[Event, int], spent: Spent, relation: Relation) -> list[str]:
    """Return lines that add up Renyi divergences at the order that gave the bound."""
    if spent.accountant != "rdp":
        return []
    rest: dict[Event, int] = {
        event: n for event, n in groups.items() if not isinstance(event, RenyiFiltered)
    }
    found = [f'total = sum(g["count"] * {_D} for g in groups if "divergence" in g["event"])']
    if rest:
        found += [
            f"a = dp.rdp.RdpAccountant([{spent.order!r}], dp.NeighboringRelation.{relation.name})",
            f'for g in groups:\n    if "divergence" not in g["event"]:\n'
            f'        a.compose({_made(rest)}, g["count"])',
            "total += a.rdp[0]",
        ]
    end = f"print(dp.rdp.compute_epsilon([{spent.order!r}], [total], {spent.delta!r})[0])"
    return [*found, end]


def _made(groups: Mapping[Event, int]) -> str:
    kinds = [kind for kind in _MAKE if any(type(event) is kind for event in groups)]
    text = _MAKE[kinds[-1]]
    for kind in reversed(kinds[:-1]):
        text = f'{_MAKE[kind]} if g["event"]["kind"] == "{_KIND[kind]}" else {text}'
    return text


def _accountants(groups: Mapping[Event, int], spent: Spent, relation: Relation) -> list[str]:
    """Return the accountants that gave a bound, at the grid that ours used."""
    near = f"dp.NeighboringRelation.{relation.name}"
    found = []
    if spent.epsilon_pld is not None:
        step = "" if spent.grid in {None, _DEFAULT_GRID} else f", {spent.grid}"
        found.append(f"dp.pld.PLDAccountant({near}{step})")
    if not any(isinstance(event, TruncatedPoissonGaussian | PoissonLaplace) for event in groups):
        orders = "" if _stock_orders() else f"{list(ORDERS)}, "
        found.append(f"dp.rdp.RdpAccountant({orders}neighboring_relation={near})")
    return found


def _stock_orders() -> bool:
    from dp_accounting.rdp import rdp_privacy_accountant

    return tuple(rdp_privacy_accountant.DEFAULT_RDP_ORDERS) == ORDERS

"""Upper bounds on the privacy loss of a composition: Renyi and the closed form.

Three accountants, each a valid upper bound wherever it answers:

* the analytic Gaussian (Balle and Wang 2018, arXiv:1805.06530, theorem 8), for
  releases without sampling, which compose into one Gaussian;
* Renyi differential privacy of ``dp_accounting`` (Mironov, Talwar and Zhang 2019,
  arXiv:1908.10530), milliseconds, loose for few rounds and small cohorts;
* the privacy loss distribution of ``dp_accounting`` (connect the dots, Doroshenko
  et al. 2022, arXiv:2207.04380), tight, up to seconds: ``distributions.py``.

``policy.py`` decides which to ask and takes the smallest.

Relations: ``dp_accounting`` gives Poisson sampling the same pair of distributions
under add-or-remove-one and replace-special (``from_gaussian_mechanism`` says so),
and so do we. Truncated Poisson needs a public number of units and is refused under
add-or-remove-one, although version 0.6.0 would answer. Its replace-one is never
asked: there its two accountants disagree by a factor of two in the noise.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from fedtune.errors import ExitCode, FedtuneError
from fedtune.privacy.events import (
    Event,
    Levels,
    PoissonGaussian,
    PoissonLaplace,
    Relation,
    RenyiFiltered,
    TruncatedPoissonGaussian,
    Unbounded,
    check,
    to_dp_event,
)

__all__ = [
    "ORDERS",
    "check_delta",
    "check_relation",
    "epsilon_of_rdp",
    "gaussian_epsilon",
    "gaussian_log_delta",
    "library_modules",
    "neighbours",
    "rdp",
    "rdp_log_delta",
    "refuse",
]

ORDERS: tuple[float, ...] = (
    *(1 + tenth / 10.0 for tenth in range(1, 100)),
    *map(float, range(11, 64)),
    128.0,
    256.0,
    512.0,
    1024.0,
)
"""Renyi orders: those of ``dp_accounting``, so that anybody gets the same numbers."""

_ORDERS = np.array(ORDERS)
_WHOLE = np.array([order.is_integer() for order in ORDERS])

RDP_ROUNDING = 1e-14
"""Added to every Renyi divergence: it is a difference of numbers near one."""


def refuse(message: str, hint: str = "") -> FedtuneError:
    """Return the error of an answer that must not be used."""
    return FedtuneError(message, hint=hint, code=ExitCode.PRIVACY)


@lru_cache(maxsize=1)
def library_modules() -> Any:
    """Return ``dp_accounting``, its distributions and its Renyi module, without log lines."""
    import dp_accounting
    from dp_accounting.pld import privacy_loss_distribution
    from dp_accounting.rdp import rdp_privacy_accountant

    # It warns about each order that it leaves out, which is safe and not news.
    logging.getLogger("absl").addFilter(lambda record: "dp_accounting" not in record.pathname)
    return dp_accounting, privacy_loss_distribution, rdp_privacy_accountant


def neighbours(relation: Relation) -> Any:
    """Return the relation in the words of ``dp_accounting``."""
    library, _, _ = library_modules()
    if relation is Relation.ADD_OR_REMOVE_ONE:
        return library.NeighboringRelation.ADD_OR_REMOVE_ONE
    if relation is Relation.REPLACE_SPECIAL:
        return library.NeighboringRelation.REPLACE_SPECIAL
    raise refuse(f"relation={relation!r} is not known", f"one of {[*Relation]}")


def check_relation(event: Event, relation: Relation) -> None:
    """Raise unless the event can be accounted under the relation."""
    if not isinstance(relation, Relation):
        raise refuse(f"relation={relation!r} is not known", f"one of {[str(r) for r in Relation]}")
    check(event)
    if isinstance(event, TruncatedPoissonGaussian) and relation is not Relation.REPLACE_SPECIAL:
        raise refuse(
            f"truncated Poisson sampling under {relation.value}",
            "its cap needs a public number of units: use replace-special",
        )
    if isinstance(event, RenyiFiltered) and event.order not in ORDERS:
        raise refuse(
            f"order={event.order!r} is not in accounting.ORDERS",
            "ask filters.best_order for one",
        )


# ---------------------------------------------------------------- Renyi


@lru_cache(maxsize=4096)
def rdp(event: Event, relation: Relation) -> NDArray[np.float64]:
    """Return the Renyi divergence of one event at every order of ``ORDERS``.

    Parameters
    ----------
    event : Event
    relation : Relation

    Returns
    -------
    ndarray, float64, shape (len(ORDERS),)
        Read-only and cached; ``inf`` where unknown: at all orders for `Unbounded`,
        for truncated Poisson sampling, for which no Renyi bound is published, and for
        sampled Laplace noise, which ``dp_accounting`` has none for. Behind a filter it is
        the filter's budget up to its order, for a Renyi divergence never falls with the
        order (van Erven and Harremoes 2014, arXiv:1206.2459, theorem 3), and ``inf`` above.

    Raises
    ------
    FedtuneError
        When an answer is NaN or negative, when no order has a finite one, or when
        it falls with the order, which a Renyi divergence never does.

    Examples
    --------
    >>> from fedtune.privacy.events import Gaussian
    >>> vector = rdp(Gaussian(2.0), Relation.ADD_OR_REMOVE_ONE)
    >>> round(float(vector[ORDERS.index(11.0)]), 6)    # alpha / (2 z^2)
    1.375
    """
    check_relation(event, relation)
    if isinstance(event, Unbounded | TruncatedPoissonGaussian | PoissonLaplace):
        vector = np.full(len(ORDERS), np.inf)
    elif isinstance(event, RenyiFiltered):
        vector = np.where(event.order >= _ORDERS, event.divergence, np.inf)
    elif isinstance(event, Levels):
        q = event.sampling_probability
        vector = np.zeros(len(ORDERS))
        for z, count in zip(event.noise_multipliers, event.counts, strict=True):
            vector = vector + count * rdp(PoissonGaussian(q, z), relation)
    else:
        _, _, module = library_modules()
        accountant = module.RdpAccountant(ORDERS, neighbours(relation))
        try:
            accountant.compose(to_dp_event(event))
        except (ArithmeticError, ValueError) as error:
            raise refuse(f"the Renyi accountant cannot answer for {event}: {error}") from error
        vector = np.asarray(accountant.rdp, dtype=np.float64) + RDP_ROUNDING
        _check_vector(vector, str(event))
        # The sum over the fractional orders overshoots for some events, safely;
        # the whole orders are exact and show when numbers have gone wrong.
        whole = vector[_WHOLE]
        if np.any(np.diff(whole[np.isfinite(whole)]) < -1e-9 * whole[-1] - RDP_ROUNDING):
            raise refuse(f"the Renyi divergence of {event} falls with the order")
        if not np.isfinite(vector).any():
            raise refuse(f"the Renyi divergence of {event} is infinite at every order")
    vector.setflags(write=False)
    return vector


def epsilon_of_rdp(vector: NDArray[np.float64], delta: float) -> tuple[float, float]:
    """Return epsilon at ``delta`` and the order that gave it.

    The conversion is that of ``dp_accounting`` (Canonne, Kamath and Steinke 2020,
    arXiv:2004.00010, proposition 12). It takes a negative divergence for perfect
    privacy; here it is an error.

    Parameters
    ----------
    vector : ndarray, float64, shape (len(ORDERS),)
        Sum of the vectors of all releases.
    delta : float
        In (0, 1).

    Returns
    -------
    tuple[float, float]
        ``(inf, 0.0)`` when the divergence is infinite at every order.

    Raises
    ------
    FedtuneError
        For a NaN or negative divergence, a wrong shape, or a wrong delta.

    Examples
    --------
    >>> from fedtune.privacy.events import PoissonGaussian
    >>> event = PoissonGaussian(0.01, 1.0)
    >>> epsilon, order = epsilon_of_rdp(1000 * rdp(event, Relation.ADD_OR_REMOVE_ONE), 1e-5)
    >>> round(epsilon, 4), round(order, 1)
    (2.1014, 7.8)
    """
    check_delta(delta)
    _check_vector(vector, "the sum")
    if not np.isfinite(vector).any():
        return math.inf, 0.0
    _, _, module = library_modules()
    epsilon, order = module.compute_epsilon(ORDERS, vector, delta)
    if not epsilon >= 0:
        raise refuse(f"the Renyi accountant answered epsilon={epsilon}")
    return float(epsilon), float(order)


def rdp_log_delta(vector: NDArray[np.float64], epsilon: NDArray[np.float64]) -> Any:
    """Return log delta at each epsilon, from the same conversion.

    Parameters
    ----------
    vector : ndarray, float64, shape (len(ORDERS),)
    epsilon : ndarray, float64, shape (n,)

    Returns
    -------
    ndarray, float64, shape (n,)

    Examples
    --------
    >>> from fedtune.privacy.events import PoissonGaussian
    >>> vector = 1000 * rdp(PoissonGaussian(0.01, 1.0), Relation.ADD_OR_REMOVE_ONE)
    >>> float(np.exp(rdp_log_delta(vector, np.array([2.1014])))[0].round(7))
    1e-05
    """
    known = np.isfinite(vector) & (_ORDERS > 1.01)
    order, divergence = _ORDERS[known], vector[known]
    if not known.any():
        return np.zeros(len(epsilon))
    each = (order - 1) * (divergence - epsilon[:, None] + np.log1p(-1 / order)) - np.log(order)
    return np.minimum(each.min(axis=1), 0.0)


def _check_vector(vector: NDArray[np.float64], what: str) -> None:
    if np.shape(vector) != (len(ORDERS),):
        raise refuse(f"{what}: {np.shape(vector)} Renyi divergences, not ({len(ORDERS)},)")
    if np.isnan(vector).any() or (vector < 0).any():
        raise refuse(f"{what}: a Renyi divergence is NaN or negative")


def check_delta(delta: float) -> None:
    """Raise unless ``delta`` is a number between 0 and 1."""
    if isinstance(delta, bool) or not 0 < delta < 1:
        raise refuse(f"delta={delta!r}", "use a number above 0 and below 1 over the units")


# ---------------------------------------------------------------- the Gaussian


def gaussian_log_delta(mu: Any, epsilon: Any) -> Any:
    """Return log delta of the Gaussian mechanism (Balle and Wang, theorem 8).

    Parameters
    ----------
    mu : float or ndarray
        Sensitivity over the standard deviation of the noise.
    epsilon : float or ndarray

    Returns
    -------
    float or ndarray
        Of the common shape.

    Examples
    --------
    >>> float(np.exp(gaussian_log_delta(1.0, 1.0)).round(6))
    0.126937
    """
    upper = log_ndtr(mu / 2 - epsilon / mu)
    lower = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(lower < upper, upper + np.log1p(-np.exp(lower - upper)), -np.inf)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon at ``delta`` of a Gaussian mechanism, rounded up.

    Parameters
    ----------
    mu : float
        Sensitivity over the standard deviation, of the whole composition:
        ``sqrt(sum(count / noise_multiplier**2))``.
    delta : float

    Returns
    -------
    float

    Examples
    --------
    >>> round(gaussian_epsilon(1.0, 1e-5), 4), round(gaussian_epsilon(2.5, 1e-5), 4)
    (4.3772, 13.2067)
    """
    check_delta(delta)
    if not math.isfinite(mu) or mu < 0:
        raise refuse(f"mu={mu}: the noise is too small for a number")
    goal = math.log(delta)
    if mu == 0 or gaussian_log_delta(mu, 0.0) < goal:
        return 0.0
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(-2 * goal)  # Mironov's bound is above it
    if not gaussian_log_delta(mu, high) <= goal:
        raise refuse(f"mu={mu}: no epsilon at delta={delta}")
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if gaussian_log_delta(mu, middle) <= goal else (middle, high)
    return high * (1 + 1e-11 + 1e-14 / mu)  # the two terms above cancel when mu is small

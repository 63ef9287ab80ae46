"""Adding up updates: in a fixed order, in bounded memory, and knowing the error.

The mean of LoRA factors is not the factor of the mean: with weights ``w_i`` that
sum to one and products ``P_i = s_i B_i A_i``,

    sum_i w_i P_i - s Bbar Abar = sum_i w_i s (B_i - Bbar)(A_i - Abar)

the between-client covariance (for equal scales). ``Products`` keeps
``sum_i w_i P_i`` exactly, in factors while these are smaller than the dense
matrix and dense from there on, so memory does not grow with the cohort.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedtune.adapters import Pair, Tensors
from fedtune.residual import Residual

__all__ = ["Cohort", "Products", "exact_residual", "recompress"]

Array = NDArray[np.float64]
_TINY = 1e-300


@dataclass
class Products:
    """Weighted sum of low-rank products of one layer; ranks and scales may differ.

    Examples
    --------
    >>> total = Products()
    >>> total.add(0.5, np.ones((2, 1)), np.ones((1, 3)))
    >>> total.add(0.5, np.ones((2, 2)), np.ones((2, 3)))
    >>> float(total.dense()[0, 0])
    1.5
    """

    _left: list[Array] = field(default_factory=list)
    _right: list[Array] = field(default_factory=list)
    _dense: Array | None = None

    def add(self, weight: float, b: NDArray[np.floating], a: NDArray[np.floating]) -> None:
        """Add ``weight * b @ a``; b is (d_out, r), a is (r, d_in)."""
        self._left.append(weight * b.astype(np.float64))
        self._right.append(a.astype(np.float64))
        rows, columns = b.shape[0], a.shape[1]
        held = sum(part.shape[1] for part in self._left) * (rows + columns)
        if held > rows * columns:
            self._dense = self.dense()
            self._left, self._right = [], []

    def dense(self) -> Array:
        """Return the sum as a (d_out, d_in) matrix."""
        parts = np.hstack(self._left) @ np.vstack(self._right) if self._left else 0.0
        return np.asarray(parts if self._dense is None else self._dense + parts)

    def minus(self, b: NDArray[np.floating], a: NDArray[np.floating]) -> tuple[Array, Array]:
        """Return factors (U, V) of the sum minus ``b @ a``, of the smallest exact rank."""
        b64, a64 = b.astype(np.float64), a.astype(np.float64)
        if self._dense is None:
            return _thin(np.hstack([*self._left, -b64]), np.vstack([*self._right, a64]))
        rows, columns = self._dense.shape
        dense = self.dense() - b64 @ a64
        return (dense, np.eye(columns)) if columns <= rows else (np.eye(rows), dense)

    def norm(self) -> float:
        """Return the Frobenius norm of the sum."""
        if self._dense is not None:
            return float(np.linalg.norm(self.dense()))
        return product_norm(np.hstack(self._left), np.vstack(self._right)) if self._left else 0.0


@dataclass
class Cohort:
    """The running weighted mean of one round's updates.

    Updates must be added in the order of the clients, whatever the order of
    arrival: floating-point sums then have the same bits every time.

    Parameters
    ----------
    adapter : Tensors
        Parameters that the updates start from.
    pairs : tuple of Pair
        Low-rank products to follow exactly.
    """

    adapter: Tensors
    pairs: tuple[Pair, ...]
    weight: float = 0.0
    count: int = 0
    _sum: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    _products: dict[str, Products] = field(default_factory=dict)

    def add(self, weight: float, delta: Tensors) -> None:
        """Add one client's update with its weight (not normalised)."""
        for name, value in delta.items():
            scaled = value * np.float32(weight)
            if name in self._sum:
                self._sum[name] += scaled
            else:
                self._sum[name] = scaled
        for pair in self.pairs:
            b = self.adapter[pair.b] + delta[pair.b]
            a = self.adapter[pair.a] + delta[pair.a]
            self._products.setdefault(pair.layer, Products()).add(weight * pair.scale, b, a)
        self.weight += weight
        self.count += 1

    def mean(self) -> Tensors:
        """Return the weighted mean update."""
        return {name: total / np.float32(self.weight) for name, total in self._sum.items()}

    def missing(self, adapter: Tensors) -> Residual:
        """Return, per layer, the exact mean product minus that of ``adapter``."""
        found: Residual = {}
        for pair in self.pairs:
            u, v = self._gap(pair, adapter)
            found[pair.layer] = ((u / self.weight).astype(np.float32), v.astype(np.float32))
        return found

    def relative_error(self, adapter: Tensors) -> float:
        """Return ``|mean product - product of means| / |mean product|`` over all layers.

        Frobenius norms, all layers as one vector; 0 when there is nothing to compare.
        """
        error, size = 0.0, 0.0
        for pair in self.pairs:
            u, v = self._gap(pair, adapter)
            error += product_norm(u, v) ** 2
            size += self._products[pair.layer].norm() ** 2
        return float(np.sqrt(error / size)) if size > _TINY else 0.0

    def _gap(self, pair: Pair, adapter: Tensors) -> tuple[Array, Array]:
        """Return factors of the summed products of one layer minus those of ``adapter``."""
        scaled = adapter[pair.b] * np.float32(self.weight * pair.scale)
        return self._products[pair.layer].minus(scaled, adapter[pair.a])


def product_norm(u: Array, v: Array) -> float:
    """Return ``|u @ v|`` (Frobenius) without forming the product, by thin QR."""
    if min(u.shape[0], v.shape[1]) <= u.shape[1]:
        return float(np.linalg.norm(u @ v))
    _, left = np.linalg.qr(u)
    _, right = np.linalg.qr(v.T)
    return float(np.linalg.norm(left @ right.T))


def exact_residual(old: Residual, missing: Residual, limit: int) -> tuple[Residual, float]:
    """Add what one round's averaging missed to the residual carried so far.

    Parameters
    ----------
    old, missing : Residual
    limit : int
        Largest rank to keep per layer; 0 keeps everything.

    Returns
    -------
    residual : Residual
    lost : float
        Share of the Frobenius norm that ``limit`` cut off; 0.0 means exact.
    """
    found: Residual = {}
    lost, size = 0.0, 0.0
    for layer, (u, v) in missing.items():
        if layer in old:
            u = np.hstack([old[layer][0], u])
            v = np.vstack([old[layer][1], v])
        left, right, cut, whole = recompress(u, v, limit)
        found[layer] = (left, right)
        lost += cut**2
        size += whole**2
    return found, float(np.sqrt(lost / size)) if size > _TINY else 0.0


def recompress(
    u: NDArray[np.floating], v: NDArray[np.floating], limit: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], float, float]:
    """Return ``u @ v`` in its smallest rank, at most ``limit``: QR of the factors, SVD of the core.

    Returns
    -------
    left : ndarray, shape (d_out, R)
    right : ndarray, shape (R, d_in)
    cut, whole : float
        Frobenius norms of what was cut off and of the whole.
    """
    q_left, r_left = np.linalg.qr(u.astype(np.float64))
    q_right, r_right = np.linalg.qr(v.astype(np.float64).T)
    core_u, values, core_v = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    # Below float32 resolution a singular value is rounding, not information.
    rank = max(1, int((values > values[0] * 1e-7).sum())) if values[0] > 0 else 1
    rank = min(rank, limit) if limit else rank
    root = np.sqrt(values[:rank])
    left = (q_left @ core_u[:, :rank]) * root
    right = (q_right @ core_v[:rank].T).T * root[:, None]
    cut = float(np.linalg.norm(values[rank:])) if limit else 0.0
    return (
        np.ascontiguousarray(left, dtype=np.float32),
        np.ascontiguousarray(right, dtype=np.float32),
        cut,
        float(np.linalg.norm(values)),
    )


def _thin(u: Array, v: Array) -> tuple[Array, Array]:
    """Keep factors as they are unless their rank exceeds what a matrix can have."""
    if u.shape[1] <= min(u.shape[0], v.shape[1]):
        return u, v
    return (u @ v, np.eye(v.shape[1])) if v.shape[1] <= u.shape[0] else (np.eye(u.shape[0]), u @ v)

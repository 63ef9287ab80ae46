"""What the gradients say that a client returns at the cut: the labels of its examples.

The loss and the labels stay at the client, but the gradient at the body's output is made
of them. The server needs no label to sort the gradients, and with the tail it can name them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["labels_by_direction", "labels_by_tail", "matched"]


def labels_by_direction(returned: torch.Tensor, classes: int, seed: int = 0) -> NDArray[np.int64]:
    """Sort examples by the direction of their gradient; needs no knowledge of the tail.

    Gradients of one class point one way (cosine attack of Li et al. 2021,
    arXiv 2102.08504; clusters as in Liu et al. 2022, arXiv 2203.05222): k-means on
    unit vectors.

    Parameters
    ----------
    returned : Tensor, shape (B, T, d)
        One gradient for each example, zero at padding.
    classes : int
    seed : int
        Of the clusters' start.

    Returns
    -------
    ndarray of int64, shape (B,)
        A cluster for each example; which class it is remains open (see ``matched``).

    Examples
    --------
    >>> one, other = torch.ones(2, 3, 4), -torch.ones(2, 3, 4)
    >>> found = labels_by_direction(torch.cat([one, 0.1 * other]), 2)
    >>> bool(found[0] == found[1] != found[2] == found[3])
    True
    """
    from sklearn.cluster import KMeans

    summed = returned.double().sum(1)
    unit = summed / summed.norm(dim=1, keepdim=True).clamp(min=1e-30)
    made = KMeans(min(classes, len(unit)), n_init=10, random_state=seed).fit_predict(unit.numpy())
    return np.asarray(made, dtype=np.int64)


def labels_by_tail(returned: torch.Tensor, made: torch.Tensor) -> NDArray[np.int64]:
    """Name each example's class: the one whose gradient through a known tail is most like it.

    Parameters
    ----------
    returned : Tensor, shape (B, T, d)
    made : Tensor, shape (K, B, T, d)
        What the server's own copy of the tail gives for each class.

    Returns
    -------
    ndarray of int64, shape (B,)

    Examples
    --------
    >>> made = torch.stack([torch.ones(1, 1, 2), -torch.ones(1, 1, 2)])
    >>> labels_by_tail(torch.tensor([[[-0.2, -0.1]]]), made)
    array([1])
    """
    inner = (returned[None] * made).sum((2, 3))
    cosine = inner / made.flatten(2).norm(dim=2).clamp(min=1e-30)
    return np.asarray(cosine.argmax(0).numpy(), dtype=np.int64)


def matched(clusters: NDArray[np.int64], truth: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say which examples are right when clusters are given names in the best way.

    The server would learn the names from one known example of each class.

    Examples
    --------
    >>> matched(np.array([1, 1, 0]), np.array([0, 0, 1])).tolist()
    [True, True, True]
    """
    from scipy.optimize import linear_sum_assignment

    size = int(max(clusters.max(), truth.max())) + 1
    table = np.zeros((size, size), dtype=np.int64)
    np.add.at(table, (clusters, truth), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    names = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return np.array([names[c] == t for c, t in zip(clusters.tolist(), truth.tolist(), strict=True)])

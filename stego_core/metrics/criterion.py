"""How good a clustering looks without labels, and how well that follows labelled scores.

Of each criterion more is better, and a clustering that says nothing (one cluster for
everything) gets 0. docs/sensitivity.md has their measured correlations with mIoU.

Letters in names: T tokens, K code channels, N clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stego_core.errors import ShapeError
from stego_core.model.kmeans import spherical_kmeans

CRITERIA = ("agreement", "stability", "margin")
"""What `inference.scoring.measure_criteria` measures of a model."""

_RESTARTS = 2  # of each half's k-means: an unlucky single start would look like instability
_ITERATIONS = 50
_ZERO = 1e-10


def adjusted_rand_index(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    """Return how much two clusterings of the same things agree on which belong together.

    Args:
        first: cluster ids, (T,) integers from 0.
        second: cluster ids, (T,); their numbering need not be that of `first`.

    Returns:
        1 for the same clusters, about 0 for independent ones, at least -0.5. 0 where there is
        nothing to agree on: either has everything in one cluster, or both everything apart.

    Raises:
        ShapeError: if the two aren't vectors of one length.
    Source: Hubert and Arabie 1985.

    Example:
        >>> adjusted_rand_index(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
        1.0
    """
    table = _contingency(first, second).astype(np.float64)
    pairs = _pairs(table).sum()
    rows, columns = _pairs(table.sum(1)).sum(), _pairs(table.sum(0)).sum()
    total = _pairs(table.sum())
    everything_in_one = max(rows, columns) >= total
    if total == 0 or everything_in_one or max(rows, columns) == 0:
        return 0.0
    expected = rows * columns / total
    return float((pairs - expected) / ((rows + columns) / 2 - expected))


def agreement(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    """Return how often two labellings with the same numbering agree, beyond chance (Cohen's kappa).

    Args:
        first: cluster ids, (T,) integers from 0.
        second: cluster ids of what each should agree with, (T,).

    Returns:
        1 for equal labellings, 0 for agreement as by chance; 0 also where there is nothing to
        agree on, because all are of one cluster or there are none.

    Raises:
        ShapeError: if the two aren't vectors of one length.
    Source: Cohen 1960.

    Example:
        >>> agreement(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]))
        0.5
    """
    table = _contingency(first, second)
    size = max(table.shape)
    square = np.zeros((size, size))
    square[: table.shape[0], : table.shape[1]] = table
    count = square.sum()
    if count == 0:
        return 0.0
    by_chance = float(square.sum(1) @ square.sum(0)) / count**2
    if by_chance >= 1:
        return 0.0
    return float((np.trace(square) / count - by_chance) / (1 - by_chance))


def margin(products_TN: Tensor, codes_TK: Tensor) -> float:
    """Return the mean cosine to the nearest centroid less that to the second nearest.

    Args:
        products_TN: inner products of codes with unit centroids.
        codes_TK: the codes.

    Returns:
        A number in [0, 2]; 0 with a single cluster. Codes without a direction count as 0.

    Example:
        >>> codes = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> margin(codes @ torch.tensor([[1.0, 0.0], [0.0, 1.0]]).T, codes)
        1.0
    """
    if products_TN.shape[1] < 2 or not len(products_TN):
        return 0.0
    norms = codes_TK.norm(dim=1, keepdim=True)
    cosines = torch.where(norms > _ZERO, products_TN / norms.clamp_min(_ZERO), 0)
    nearest = cosines.topk(2, dim=1).values
    return float((nearest[:, 0] - nearest[:, 1]).double().mean())


def stability(halves: tuple[Tensor, Tensor], count: int, *, seed: int) -> float:
    """Return how alike the clusters are that k-means finds in two halves of the images.

    Args:
        halves: codes (T, K) of two disjoint sets of images.
        count: N, the clusters.
        seed: of the starts.

    Returns:
        Adjusted Rand index of the two clusterings, each applied to both halves; 0 where a half has
        fewer codes with a direction than `count`, since what only judges ends no training.

    Source: Lange et al. 2004 (stability of a clustering on data it was not fitted on).
    """
    if min(int((half.norm(dim=1) > _ZERO).sum()) for half in halves) < count:
        return 0.0
    everything = torch.cat(halves)
    labels = []
    for number, half in enumerate(halves):
        found = spherical_kmeans(
            half, count, seed=seed + number, restarts=_RESTARTS, max_iterations=_ITERATIONS
        )
        labels.append((everything @ found.centroids.T).argmax(1).numpy())
    return adjusted_rand_index(labels[0], labels[1])


def mutual_nearest(first_TC: Tensor, second_TC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs of tokens of two images that are each other's nearest by cosine.

    Args:
        first_TC: unit features of one image's tokens.
        second_TC: unit features of the other's.

    Returns:
        Positions in the first and in the second, (P,) each; P is at least 1 unless one is empty.
    """
    similar = first_TC @ second_TC.T
    forth, back = similar.argmax(1), similar.argmax(0)
    here = torch.arange(len(first_TC))
    mutual = back[forth] == here
    return here[mutual], forth[mutual]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; NaN with fewer than 3 pairs or where one never varies.

    Pairs with a NaN are left out; equal values share their mean rank.

    Example:
        >>> rank_correlation([1, 2, 3, 4], [10, 20, 40, 30])
        0.8
    """
    pairs = np.array([p for p in zip(first, second, strict=True) if not np.isnan(p).any()])
    if len(pairs) < 3:
        return math.nan
    ranks = np.stack([_ranks(column) for column in pairs.T])
    if not ranks.std(1).all():
        return math.nan
    return round(float(np.corrcoef(ranks)[0, 1]), 12)


def _ranks(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    ranks: npt.NDArray[Any] = (ends - (counts - 1) / 2)[inverse]
    return ranks


def _pairs(counts: Any) -> Any:
    return counts * (counts - 1) / 2


def _contingency(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if first.ndim != 1 or first.shape != second.shape:
        raise ShapeError(
            f"clusterings of shapes {first.shape} and {second.shape}: give two vectors of one "
            "length"
        )
    if not first.size:
        return np.zeros((1, 1), np.int64)
    columns = int(second.max()) + 1
    flat = np.bincount(first.astype(np.int64) * columns + second)
    table = np.zeros((int(first.max()) + 1) * columns, np.int64)
    table[: len(flat)] = flat
    return table.reshape(-1, columns)

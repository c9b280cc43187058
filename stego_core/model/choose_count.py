"""How many clusters: as many as matched points agree on, or as are the most compact.

Letters in names: N points, D dimensions, M clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.errors import ConfigError
from stego_core.model.kmeans import spherical_kmeans

# Each about 1.4 times the one before.
CANDIDATES = (2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64)
_POINTS_PER_CLUSTER = 10  # fewer say nothing about a cluster
_RESTARTS = 4
# Of the best agreement; numbers that reach it count as equally good (docs/adr/0033).
_ENOUGH = 0.95


@dataclass(frozen=True, slots=True)
class CountChoice:
    """The chosen number and why.

    Attributes:
        count: the number of clusters.
        scores: of each candidate.
    """

    count: int
    scores: dict[int, float]


def simplified_silhouette(points_ND: Tensor, centroids_MD: Tensor) -> float:
    """Compute the mean over points of (b - a) / b.

    a is the cosine distance to the nearest centroid, b that to the second nearest: near 1 where
    clusters are compact and far apart, near 0 where a point could as well be its neighbour's.

    Args:
        points_ND: points, (N, D); only their directions count.
        centroids_MD: at least two directions, (M, D).

    Source: Hruschka et al. 2006, the silhouette of Rousseeuw 1987 with distances to centroids.
    """
    cosines = F.normalize(points_ND, dim=1) @ F.normalize(centroids_MD, dim=1).T
    own, other = (1 - cosines.topk(2).values).clamp(min=0).double().unbind(1)
    return float(torch.where(other > 0, (other - own) / other.clamp_min(1e-12), 0).mean())


def choose_count(
    points_ND: Tensor,
    *,
    seed: int,
    weights_N: Tensor | None = None,
    agreement: Callable[[Tensor], float] | None = None,
    candidates: tuple[int, ...] = CANDIDATES,
) -> CountChoice:
    """Choose the number of clusters of spherical k-means without labels.

    With the agreement of matched points the largest number is taken whose agreement is at least
    95 % of the best: two clusters are easily agreed on, and more say more. Without it the number
    with the highest simplified silhouette is, of equals the smallest.

    Args:
        points_ND: points, (N, D); only their directions count.
        seed: of the k-means.
        weights_N: how much each point counts.
        agreement: centroids (M, D) to how far matched points agree, at most 1.
        candidates: numbers to try, at least 2 each; those for which there are fewer than ten
            points per cluster are left out.

    Raises:
        ConfigError: if there are too few points for any candidate.
    Source: the largest number that still predicts other data is that of Tibshirani and Walther
        2005 (prediction strength); here it predicts the other one of two matched points.
    """
    tried = [count for count in candidates if count * _POINTS_PER_CLUSTER <= len(points_ND)]
    if not tried:
        raise ConfigError(
            f"{len(points_ND)} codes are too few to choose a number of clusters from: give "
            "clusters.count, or use more images"
        )
    scores = {}
    for count in tried:
        centroids = spherical_kmeans(
            points_ND,
            count,
            seed=seed,
            restarts=_RESTARTS,
            weights_N=weights_N,
            prefer=agreement,
        ).centroids
        score = agreement or partial(simplified_silhouette, points_ND)
        scores[count] = round(score(centroids), 4)
    best = max(scores.values())
    if agreement is None or best <= 0:  # nothing is agreed on
        return CountChoice(min(count for count in tried if scores[count] == best), scores)
    return CountChoice(max(count for count in tried if scores[count] >= _ENOUGH * best), scores)

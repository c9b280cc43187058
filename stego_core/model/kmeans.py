"""Spherical k-means: directions that the codes gather around, found without labels.

Letters in names: N points, D dimensions, M clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.errors import ConfigError, ShapeError

# Cosines of all points with all centroids are never held at once beyond this size.
_BLOCK_BYTES = 16 * 2**20
# Points below this length count as zero vectors.
_ZERO_NORM = 1e-10
# Centroids whose points cancel out to less than this length have no direction.
_SMALLEST_NORM = 1e-6
# Starts that are drawn for each that is kept.
_DRAWS = 8
# An iteration that raises the mean cosine by less than this ends a start.
_TOLERANCE = 1e-5
# What one unit of preference is worth, as a share of the best objective (ADR 24 has the trials).
_PREFERENCE = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class KMeansResult:
    """The best start of a k-means."""

    centroids: Tensor
    """Unit rows, (M, D) float32, on the points' device."""
    objective: float
    """Mean cosine of the points with their nearest centroid, in [-1, 1]; higher is better."""
    objectives: tuple[float, ...]
    """The objective that every start reached."""
    revived: int
    """How often, over all starts and iterations, a cluster without points was moved to one."""


@torch.no_grad()
def spherical_kmeans(
    points_ND: Tensor,
    count: int,
    *,
    seed: int,
    restarts: int = 8,
    max_iterations: int = 100,
    weights_N: Tensor | None = None,
    prefer: Callable[[Tensor], float] | None = None,
) -> KMeansResult:
    """Find unit vectors that maximise the mean cosine of points with their nearest one.

    Each start is a k-means++ on cosine distance followed by Lloyd iterations; the start with the
    highest mean cosine is kept, or, with `prefer`, the best by both. A cluster that loses its
    points moves to the point that is fitted worst. On a CPU the seed and the thread count
    determine the result to the last bit.

    Args:
        points_ND: points, (N, D); only their directions count. Zero vectors have none and are
            left out of the fit and of the objective.
        count: M, number of clusters.
        seed: seed of all starts; fewer restarts run the first ones of many.
        restarts: number of starts, at least 1.
        max_iterations: Lloyd iterations of a start; 0 keeps what k-means++ chose.
        weights_N: how much each point counts, at least 0, in starts, centroids and objective;
            None counts all alike.
        prefer: centroids (M, D) to a number, higher is better; a fifth of it is added to the
            share of the best mean cosine that a start reached.

    Returns:
        Centroids and objectives. With fewer than M distinct directions some centroids are equal.

    Raises:
        ConfigError: if there are fewer than M non-zero points, a point isn't finite, or a number
            is out of range.
        ShapeError: if the points aren't a matrix.
    Source: Dhillon and Modha 2001 (spherical k-means); Arthur and Vassilvitskii 2007 (k-means++).
        Takes the place of the original's clusters trained by SGD, which can lose clusters.
    """
    directed_N = _check_points(points_ND, count, restarts)
    unit_ND = F.normalize(points_ND[directed_N].float(), dim=1, eps=_ZERO_NORM)
    weights_N = torch.ones(len(directed_N)) if weights_N is None else weights_N
    if len(weights_N) != len(directed_N):
        raise ShapeError(f"{len(weights_N)} weights for {len(directed_N)} points: give one each")
    shares_N = weights_N.to(unit_ND)[directed_N]
    points = _Points.of(unit_ND, shares_N / shares_N.mean())
    generator = torch.Generator().manual_seed(seed)
    ends = [
        _iterate(points, _choose_start(points, count, generator), max_iterations)
        for _ in range(restarts)
    ]
    best = _choose_end(ends, prefer)
    return KMeansResult(
        centroids=best.centroids,
        objective=best.objective,
        objectives=tuple(end.objective for end in ends),
        revived=sum(end.revived for end in ends),
    )


class _Points(NamedTuple):
    """Unit rows, their shares of the weight (1 on average), and the rows times these."""

    unit: Tensor
    shares: Tensor
    weighted: Tensor

    @classmethod
    def of(cls, unit_ND: Tensor, shares_N: Tensor) -> _Points:
        return cls(unit_ND, shares_N, unit_ND * shares_N[:, None])


class _End(NamedTuple):
    """Where a start ended."""

    centroids: Tensor
    objective: float
    revived: int


def _choose_end(ends: list[_End], prefer: Callable[[Tensor], float] | None) -> _End:
    if prefer is None:
        return max(ends, key=lambda end: end.objective)
    highest = max(end.objective for end in ends)

    def merit(end: _End) -> float:
        share = end.objective / max(highest, _ZERO_NORM)
        return share + _PREFERENCE * prefer(end.centroids)

    return max(ends, key=merit)


def _check_points(points_ND: Tensor, count: int, restarts: int) -> Tensor:
    """Return which points have a direction, (N,) bool."""
    if points_ND.ndim != 2:
        raise ShapeError(f"k-means got points of shape {tuple(points_ND.shape)}: give (N, D)")
    if count < 1 or restarts < 1:
        raise ConfigError(
            f"k-means can't make {count} clusters from {restarts} starts: choose at least 1 of each"
        )
    norms = torch.linalg.vector_norm(points_ND.float(), dim=1)
    if not bool(torch.isfinite(norms).all()):
        raise ConfigError(
            "k-means got codes that are not finite: the training diverged, lower train.head_lr"
        )
    directed: Tensor = norms > _ZERO_NORM
    if int(directed.sum()) < count:
        raise ConfigError(
            f"k-means got {int(directed.sum())} usable codes for {count} clusters: lower "
            "clusters.count, or use more images"
        )
    return directed


def _choose_start(points: _Points, count: int, generator: torch.Generator) -> Tensor:
    # k-means++: each further start is drawn with probability proportional to weight times
    # 1 - cosine, which is half the squared distance of unit vectors. Of several draws the one that
    # leaves the smallest gaps is kept.
    unit_ND, shares_N, _ = points
    chosen = _draw(shares_N, generator)
    starts = [chosen]
    gaps = (1 - unit_ND @ unit_ND[chosen]).clamp_(min=0)
    for _ in range(count - 1):
        drawn = [_draw(gaps * shares_N, generator) for _ in range(_DRAWS)]
        left_ND = torch.minimum(gaps[:, None], (1 - unit_ND @ unit_ND[drawn].T).clamp_(min=0))
        best = int((shares_N @ left_ND).argmin())
        gaps = left_ND[:, best]
        starts.append(drawn[best])
    return unit_ND[starts].clone()


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    # Inverse of the cumulative distribution: torch.multinomial stops at 2^24 choices. Where all
    # weights are 0 (only duplicates are left) any point is as good as another.
    share = float(torch.rand((), generator=generator, dtype=torch.float64))
    cumulative = weights.double().cumsum(0)
    total = float(cumulative[-1])
    if total <= 0:
        return int(share * len(weights))
    target = torch.tensor(share * total, dtype=torch.float64, device=weights.device)
    index = int(torch.searchsorted(cumulative, target, right=True))
    return min(index, len(weights) - 1)


def _iterate(points: _Points, centroids_MD: Tensor, max_iterations: int) -> _End:
    nearest, cosines = _assign(points.unit, centroids_MD)
    objective = float((cosines * points.shares).double().mean())
    revived = 0
    for _ in range(max_iterations):
        moved_MD, dead = _move(points, nearest, cosines, len(centroids_MD))
        revived += dead
        nearest, cosines = _assign(points.unit, moved_MD)
        reached = float((cosines * points.shares).double().mean())
        # Rounding can lower the objective in its last digits: the better centroids are kept.
        gain = reached - objective
        if gain > 0:
            centroids_MD, objective = moved_MD, reached
        if gain <= _TOLERANCE:
            break
    return _End(centroids_MD, objective, revived)


def _assign(unit_ND: Tensor, centroids_MD: Tensor) -> tuple[Tensor, Tensor]:
    rows = max(1, _BLOCK_BYTES // (4 * len(centroids_MD)))
    best = [
        (unit_ND[first : first + rows] @ centroids_MD.T).max(dim=1)
        for first in range(0, len(unit_ND), rows)
    ]
    return torch.cat([block.indices for block in best]), torch.cat([block.values for block in best])


def _move(points: _Points, nearest: Tensor, cosines: Tensor, count: int) -> tuple[Tensor, int]:
    sums_MD = points.unit.new_zeros(count, points.unit.shape[1])
    sums_MD.index_add_(0, nearest, points.weighted)
    norms = torch.linalg.vector_norm(sums_MD, dim=1)
    dead = (norms < _SMALLEST_NORM).nonzero()[:, 0]
    if len(dead):
        misfits = (1 - cosines) * points.shares
        sums_MD[dead] = points.unit[misfits.topk(len(dead)).indices]
    return F.normalize(sums_MD, dim=1), len(dead)

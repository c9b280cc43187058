"""Exact scores of pairs of vectors, and lists of the best of them.

A matrix product rounds a score differently with the shape of the tile, so that even equal images
would come in another order when the gallery is cut in another way. Here vectors are rounded to
multiples of 2^-26 and multiplied in float64, where each sum of up to 2^53 units of 2^-52 is exact
and so the same in every order.

Legend: Q queries, G gallery rows, D channels, k neighbours, W candidates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_UNITS = 2**26
_BLOCK_BYTES = 2**23  # of gathered rows: stays in the cache
NONE = -1  # index of a neighbour that does not exist: the gallery has fewer than k candidates


def exact_rows(rows: Tensor) -> Tensor:
    """Return rows in float64, rounded so that their products and sums are exact."""
    return rows.to(torch.float64, copy=True).mul_(_UNITS).round_().div_(_UNITS)


def rounding_error(dim: int) -> float:
    """Return how far rounding moves the score of two unit vectors of `dim` channels at most."""
    return 2 * math.sqrt(dim) / (2 * _UNITS) + dim / (2 * _UNITS) ** 2


def no_neighbors(rows: int, k: int) -> tuple[Tensor, Tensor]:
    """Return empty lists: scores (rows, k) of -inf and indices (rows, k) of `NONE`."""
    return torch.full((rows, k), -torch.inf), torch.full((rows, k), NONE)


def merge_top_k(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], k: int
) -> tuple[Tensor, Tensor]:
    """Merge two lists of neighbours of the same queries into the best k.

    Args:
        a: scores (Q, i) and indices (Q, i).
        b: scores (Q, j) and indices (Q, j); i + j >= k.
        k: neighbours kept.

    Returns:
        Scores (Q, k) falling, ties by rising index; `NONE` comes last.
    """
    scores, indices = torch.cat([a[0], b[0]], 1), torch.cat([a[1], b[1]], 1)
    by_index = indices.argsort(1)
    scores, indices = scores.gather(1, by_index), indices.gather(1, by_index)
    scores, order = torch.sort(scores, dim=1, descending=True, stable=True)
    return scores[:, :k], indices.gather(1, order)[:, :k]


def best_candidates(
    queries_QD: Tensor, gallery_GD: Tensor, candidates_QW: Tensor, k: int, *, tile_bytes: int
) -> tuple[Tensor, Tensor]:
    """Return the k best of each query's candidates by their exact scores.

    Args:
        queries_QD: float32.
        gallery_GD: float32.
        candidates_QW: int64 gallery rows, each at most once per query, `NONE` where there is none.
        k: neighbours wanted.
        tile_bytes: about the memory of the candidates' rows that are held at a time.

    Returns:
        Scores (Q, k) float32, falling, ties by rising index, and gallery indices (Q, k) int64.
    """
    width = candidates_QW.shape[1]
    rows = max(1, min(tile_bytes, _BLOCK_BYTES) // max(1, 16 * width * gallery_GD.shape[1]))
    parts = [no_neighbors(0, k)]
    for start in range(0, len(queries_QD), rows):
        candidates = candidates_QW[start : start + rows]
        vectors = exact_rows(gallery_GD[candidates.clamp(min=0)])
        queries = exact_rows(queries_QD[start : start + rows])
        scores = torch.bmm(vectors, queries[:, :, None])[:, :, 0].float()
        scores.masked_fill_(candidates == NONE, -torch.inf)
        none = no_neighbors(len(candidates), k)
        found = none[0].to(scores.device), none[1].to(scores.device)
        parts.append(merge_top_k((scores, candidates), found, k))
    device = queries_QD.device
    scores = torch.cat([scores.to(device) for scores, _ in parts])
    return scores, torch.cat([index.to(device) for _, index in parts])


class OwnGroups:
    """Which rows of a gallery block have the group of a query.

    Args:
        groups_G: int64 group of each row.
    """

    def __init__(self, groups_G: Tensor) -> None:
        self._sorted, self._order = groups_G.sort()

    @property
    def largest(self) -> int:
        """Return the number of rows of the largest group."""
        counts = torch.unique_consecutive(self._sorted, return_counts=True)[1]
        return int(counts.max()) if len(counts) else 0

    def exclude(self, scores_QG: Tensor, query_groups_Q: Tensor) -> None:
        """Set the scores of each query's own group to -inf, in place."""
        first = torch.searchsorted(self._sorted, query_groups_Q)
        counts = torch.searchsorted(self._sorted, query_groups_Q, right=True) - first
        total = int(counts.sum())
        if not total:
            return
        queries = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        ends = counts.cumsum(0)
        within = torch.arange(total, device=counts.device) - (ends - counts)[queries]
        scores_QG[queries, self._order[first[queries] + within]] = -torch.inf

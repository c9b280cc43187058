"""Exact nearest neighbours by tiled matrix products with bounded memory.

A matrix product rounds a score differently with the shape of the tile, so that even equal images
would come in another order when the gallery is cut in another way. Here vectors are rounded to
multiples of 2^-26 and multiplied in float64, where each sum of up to 2^53 units of 2^-52 is exact
and so the same in every order. It costs 1.7 times the time of float32 on a CPU.

Legend: Q queries, G gallery rows, D channels, k neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

_UNITS = 2**26
_COLUMNS = 8192  # of a tile: few enough that its float64 copy of the gallery stays small
NONE = -1  # index of a neighbour that does not exist: the gallery has fewer than k candidates


def exact_top_k(
    queries_QD: Tensor,
    gallery_GD: Tensor,
    k: int,
    *,
    query_groups_Q: Tensor,
    gallery_groups_G: Tensor,
    tile_bytes: int = 64 * 2**20,
) -> tuple[Tensor, Tensor]:
    """Return the k most similar gallery rows of every query.

    Rows of the query's own group (the views of one image, the query among them) are never its
    neighbours. Equal scores are ordered by gallery index, so that the result does not depend on
    how the gallery is cut.

    Args:
        queries_QD: float32, rows of unit length (longer than that, ties may break otherwise).
        gallery_GD: float32, rows of unit length.
        k: neighbours wanted; fewer candidates leave `NONE` with score -inf at the end.
        query_groups_Q: int64 group of each query.
        gallery_groups_G: int64 group of each gallery row.
        tile_bytes: bound on the score tile; with its masks and copies about three times as much is
            in use.

    Returns:
        Scores (Q, k) float32, falling, and gallery indices (Q, k) int64.
    """
    block = max(1, min(len(gallery_GD), _COLUMNS))
    rows = max(1, tile_bytes // (8 * block))
    parts = []
    for start in range(0, len(queries_QD), rows):
        queries = _exact(queries_QD[start : start + rows])
        groups = query_groups_Q[start : start + rows]
        best = _empty(len(queries), k)
        for offset in range(0, len(gallery_GD), block):
            scores = (queries @ _exact(gallery_GD[offset : offset + block]).T).float()
            own = groups[:, None] == gallery_groups_G[None, offset : offset + block]
            scores.masked_fill_(own, -torch.inf)
            best = merge_top_k(best, _tile_top_k(scores, k, offset), k)
        parts.append(best)
    if not parts:
        return _empty(0, k)
    return torch.cat([scores for scores, _ in parts]), torch.cat([index for _, index in parts])


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


def skip_first(
    best: tuple[Tensor, Tensor], queries_QD: Tensor, own_Q: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Put each query among its neighbours and leave out whatever comes first.

    The original does so in place of leaving out the query itself: where a view has an exact
    duplicate, that may come first, and the view becomes its own neighbour.

    Args:
        best: scores (Q, k) and indices (Q, k) without the queries themselves.
        queries_QD: float32, rows of unit length.
        own_Q: gallery index of each query.
        k: neighbours kept.

    Returns:
        Scores (Q, k) float32 and gallery indices (Q, k) int64, as `exact_top_k` has them.
    """
    scores = _exact(queries_QD).square().sum(1, keepdim=True).float()
    merged_scores, indices = merge_top_k(best, (scores, own_Q[:, None]), k + 1)
    return merged_scores[:, 1:], indices[:, 1:]


def _exact(rows: Tensor) -> Tensor:
    return (rows.double() * _UNITS).round_().div_(_UNITS)


def _empty(rows: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.full((rows, k), -torch.inf), torch.full((rows, k), NONE)


def _tile_top_k(scores: Tensor, k: int, offset: int) -> tuple[Tensor, Tensor]:
    width = min(k, scores.shape[1])
    best, index = scores.topk(width, 1)
    # topk picks any of the columns that tie for the last place; take the first ones instead.
    ties = (scores >= best[:, -1:]).sum(1) > width
    if ties.any():
        ordered, order = torch.sort(scores[ties], dim=1, descending=True, stable=True)
        best[ties], index[ties] = ordered[:, :width], order[:, :width]
    index = torch.where(best == -torch.inf, NONE, index + offset)
    return best, index

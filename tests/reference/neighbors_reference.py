"""Nearest neighbours by two loops and a sort, to test the tiled search against."""

from __future__ import annotations

import numpy as np


def top_k(
    queries: np.ndarray,
    gallery: np.ndarray,
    k: int,
    query_groups: np.ndarray,
    gallery_groups: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (Q, k) falling and indices (Q, k), ties by rising index; -inf and -1 at the end."""
    scores = np.full((len(queries), k), -np.inf)
    indices = np.full((len(queries), k), -1)
    for q in range(len(queries)):
        found = []
        for g in range(len(gallery)):
            if query_groups[q] != gallery_groups[g]:
                products = queries[q].astype(np.float64) * gallery[g].astype(np.float64)
                found.append((-float(sum(products)), g))
        for place, (negative, g) in enumerate(sorted(found)[:k]):
            scores[q, place], indices[q, place] = -negative, g
    return scores, indices

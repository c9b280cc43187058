"""Re-ranking: the same neighbours, in the order of another embedding.

Letters in names: V views, N candidates, D embedding channels.
"""

from __future__ import annotations

import numpy as np

from stego_core.errors import ShapeError
from stego_core.neighbors.search import NONE

_SMALLEST_NORM = 1e-12  # embeddings without a direction are alike to nothing


def rerank_neighbors(
    candidates_VN: np.ndarray, embeddings_VD: np.ndarray, count: int
) -> np.ndarray:
    """Return the candidates of each view that are nearest to it by another embedding.

    Args:
        candidates_VN: views, `NONE` where a view has fewer than N.
        embeddings_VD: of all views; only directions count.
        count: how many are kept, at least 1.

    Returns:
        (V, count) int64 by falling cosine, equal ones in the candidates' order; `NONE` where a
        view has fewer.

    Raises:
        ShapeError: if there isn't one row of each for every view.
    """
    if len(candidates_VN) != len(embeddings_VD):
        raise ShapeError(
            f"{len(candidates_VN)} rows of candidates, {len(embeddings_VD)} of embeddings: give "
            "one each for every view"
        )
    norms = np.linalg.norm(embeddings_VD, axis=1, keepdims=True)
    unit_VD = embeddings_VD / np.maximum(norms, _SMALLEST_NORM)
    nearest = np.full((len(candidates_VN), count), NONE, np.int64)
    for view, candidates in enumerate(candidates_VN):
        present = candidates[candidates != NONE]
        order = np.argsort(-(unit_VD[present] @ unit_VD[view]), kind="stable")[:count]
        nearest[view, : len(order)] = present[order]
    return nearest

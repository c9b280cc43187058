"""How many of the true neighbours an approximate search finds."""

from __future__ import annotations

import numpy as np

from stego_core.neighbors.scores import NONE

_SAMPLE = 1000  # views: the standard error of a recall of 0.95 over 30 neighbours is below 0.002
_TRAIN_STREAM, _RECALL_STREAM = 7, 8


def sample_views(num_views: int, rows: int | None, *, seed: int) -> np.ndarray:
    """Return distinct views drawn by the seed, in rising order.

    Args:
        num_views: to draw from.
        rows: views to train an index on; None draws those that recall is measured on, which are
            drawn by themselves.
        seed: of the job.
    """
    stream = _RECALL_STREAM if rows is None else _TRAIN_STREAM
    generator = np.random.default_rng([seed, stream])
    count = min(num_views, _SAMPLE if rows is None else rows)
    return np.sort(generator.choice(num_views, count, replace=False))


def recall(found_QK: np.ndarray, true_QK: np.ndarray) -> float:
    """Return the share of the true neighbours that were found, 1 where there are none.

    >>> recall(np.array([[1, 2], [5, -1]]), np.array([[2, 3], [5, -1]]))
    0.6666666666666666
    """
    present = true_QK != NONE
    hits = (found_QK[:, :, None] == true_QK[:, None, :]).any(1) & present
    return float(hits.sum() / present.sum()) if present.any() else 1.0

"""Counting of pixels by true class and prediction.

Orientation, here and everywhere: `confusion[true, pred]`. Matrices of parts add up to the matrix
of the whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stego_core.errors import ShapeError

IGNORE_INDEX = 255

# Pixels counted at a time; bounds the int64 copies of large 8-bit maps to 8 MiB each.
_BLOCK_PIXELS = 2**20


def confusion_matrix(
    true: npt.NDArray[Any], pred: npt.NDArray[Any], *, num_classes: int, num_clusters: int
) -> npt.NDArray[np.int64]:
    """Count pixels by true class and predicted cluster (or predicted class).

    Args:
        true: class ids, any shape, integers. Pixels with 255 or an id outside [0, num_classes)
            are left out.
        pred: cluster ids, same shape, integers in [0, num_clusters) wherever `true` counts.
        num_classes: rows of the result.
        num_clusters: columns of the result.

    Returns:
        Counts, (num_classes, num_clusters) int64, oriented [true, pred]; add them to merge.

    Raises:
        ShapeError: if the maps differ in shape, aren't integers, or a prediction is out of range.

    Example:
        >>> import numpy as np
        >>> confusion_matrix(
        ...     np.array([0, 1, 1, 255]), np.array([2, 0, 0, 1]), num_classes=2, num_clusters=3
        ... )
        array([[0, 0, 1],
               [2, 0, 0]])
    """
    if true.shape != pred.shape:
        raise ShapeError(f"labels {true.shape} and predictions {pred.shape}: give equal shapes")
    if true.dtype.kind not in "iu" or pred.dtype.kind not in "iu":
        raise ShapeError(f"labels are {true.dtype}, predictions {pred.dtype}: give integer ids")
    flat_true, flat_pred = true.ravel(), pred.ravel()
    counts = np.zeros(num_classes * num_clusters, dtype=np.int64)
    for start in range(0, flat_true.size, _BLOCK_PIXELS):
        block_true = flat_true[start : start + _BLOCK_PIXELS].astype(np.int64)
        block_pred = flat_pred[start : start + _BLOCK_PIXELS].astype(np.int64)
        scored = (block_true >= 0) & (block_true < num_classes) & (block_true != IGNORE_INDEX)
        block_true, block_pred = block_true[scored], block_pred[scored]
        if block_pred.size and not 0 <= block_pred.min() <= block_pred.max() < num_clusters:
            raise ShapeError(
                f"predictions lie in [{block_pred.min()}, {block_pred.max()}]: they must lie in "
                f"[0, {num_clusters})"
            )
        counts += np.bincount(block_true * num_clusters + block_pred, minlength=counts.size)
    return counts.reshape(num_classes, num_clusters)

"""Scores of single images under the global matching: where a model fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

_SCHEMA = pa.schema(
    [
        ("image_uri", pa.string()),
        ("pixels", pa.int64()),
        ("accuracy", pa.float64()),
        ("true_class", pa.int32()),
        ("predicted", pa.int32()),
        ("predicted_class", pa.int32()),
        ("wrong_pixels", pa.int64()),
    ],
    metadata={"stego.schema": "image-scores/1"},
)


def count_pairs(confusion: np.ndarray) -> np.ndarray:
    """Return the cells of a confusion matrix that are not 0.

    Args:
        confusion: counts, (classes, clusters), oriented [true, pred].

    Returns:
        (cells, 3) int64: true class, cluster, pixels.

    Example:
        >>> count_pairs(np.array([[0, 3], [5, 0]])).tolist()
        [[0, 1, 3], [1, 0, 5]]
    """
    true, predicted = np.nonzero(confusion)
    return np.stack([true, predicted, confusion[true, predicted]], axis=1).astype(np.int64)


def image_scores(
    pairs: Mapping[str, np.ndarray],
    *,
    classes: Sequence[int],
    matching: Mapping[int, int],
    dropped_extra: bool = False,
) -> pa.Table:
    """Return accuracy and largest error of each image, the worst image first.

    The matching is that of the whole split: an image has none of its own, which would flatter it.

    Args:
        pairs: of `count_pairs`, by URI of the image.
        classes: that are scored; other pixels don't count.
        matching: class of each matched cluster.
        dropped_extra: as in `score_clusters`.

    Returns:
        A row for each image with scored pixels: `image_uri`, `pixels` (scored), `accuracy`
        (percent), and of the largest group of wrong pixels `true_class`, `predicted` (cluster),
        `predicted_class` (null if the cluster has none) and `wrong_pixels`; null without errors.
    """
    rows = []
    for uri, cells in pairs.items():
        scored = cells[np.isin(cells[:, 0], list(classes))]
        if dropped_extra:
            scored = scored[scored[:, 1] < len(classes)]
        pixels = int(scored[:, 2].sum())
        if not pixels:
            continue
        matched = np.array([matching.get(int(cluster), -1) for cluster in scored[:, 1]])
        right = matched == scored[:, 0]
        row = {
            "image_uri": uri,
            "pixels": pixels,
            "accuracy": 100 * int(scored[right, 2].sum()) / pixels,
        }
        if not right.all():
            errors = scored[~right]
            true, cluster, count = (int(value) for value in errors[errors[:, 2].argmax()])
            row |= {"true_class": true, "predicted": cluster, "wrong_pixels": count}
            row["predicted_class"] = matching.get(cluster)
        rows.append(row)
    rows.sort(key=lambda row: (row["accuracy"], row["image_uri"]))
    return pa.Table.from_pylist(rows, _SCHEMA)

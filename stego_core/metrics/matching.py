"""Assignment of clusters, which have no names, to the classes of the labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from stego_core.errors import ShapeError


def match_clusters(confusion: npt.NDArray[np.int64], classes: Sequence[int]) -> dict[int, int]:
    """Match clusters to classes one to one, so that the most pixels are right.

    Args:
        confusion: counts, (num_classes, num_clusters), oriented [true, pred].
        classes: the classes to match: different rows of `confusion`.

    Returns:
        Class of each matched cluster. With more clusters than classes the rest is absent; with
        fewer, some classes have no cluster. Numbering clusters otherwise never changes a score.

    Raises:
        ShapeError: if `confusion` isn't a matrix of counts or `classes` aren't different rows.
    Source: Hamilton et al. 2022, section 4 (Hungarian matching). A dictionary avoids the
        off-by-one of the original code with extra clusters.

    Example:
        >>> import numpy as np
        >>> match_clusters(np.array([[1, 9, 0], [5, 2, 1]]), [0, 1])
        {0: 1, 1: 0}
    """
    check_confusion(confusion, classes)
    if len(classes) == 0:
        return {}
    scored = confusion[list(classes)]
    # Several assignments can be best. Sorting the columns by content makes the choice among them
    # independent of how clusters are numbered, so that scores are too.
    order = np.lexsort(confusion)
    rows, columns = linear_sum_assignment(scored[:, order], maximize=True)
    matching = {
        int(order[column]): int(classes[row]) for row, column in zip(rows, columns, strict=True)
    }
    return dict(sorted(matching.items()))


def many_to_one(confusion: npt.NDArray[np.int64], classes: Sequence[int]) -> dict[int, int]:
    """Match every cluster to the class that most of its pixels have.

    Flatters many clusters: compare it only between equal numbers of them.

    Args:
        confusion: counts, (num_classes, num_clusters), oriented [true, pred].
        classes: the classes to match: different rows of `confusion`.

    Returns:
        Class of each cluster, the first in `classes` where several have equal counts; clusters
        without a pixel of these classes are absent.

    Raises:
        ShapeError: if `confusion` isn't a matrix of counts or `classes` aren't different rows.

    Example:
        >>> import numpy as np
        >>> many_to_one(np.array([[1, 9, 0], [5, 2, 0]]), [0, 1])
        {0: 1, 1: 0}
    """
    check_confusion(confusion, classes)
    if len(classes) == 0:
        return {}
    scored = confusion[list(classes)]
    used = np.flatnonzero(scored.sum(axis=0))
    return {int(cluster): int(classes[int(scored[:, cluster].argmax())]) for cluster in used}


def check_confusion(confusion: npt.NDArray[np.int64], classes: Sequence[int]) -> None:
    """Check that `confusion` is a matrix of counts and that `classes` are different rows of it.

    Raises:
        ShapeError: if not.

    Example:
        >>> import numpy as np
        >>> check_confusion(np.zeros((2, 3), dtype=np.int64), [0, 1])
    """
    if confusion.ndim != 2 or confusion.dtype.kind not in "iu":
        raise ShapeError(
            f"a confusion of shape {confusion.shape} and type {confusion.dtype} can't be scored: "
            "give integer counts (num_classes, num_clusters)"
        )
    outside = [row for row in classes if not 0 <= row < len(confusion)]
    if outside or len(set(classes)) != len(classes):
        raise ShapeError(
            f"classes {list(classes)} can't be scored: give different ids in [0, {len(confusion)})"
        )

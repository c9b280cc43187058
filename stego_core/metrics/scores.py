"""mIoU and accuracy from a confusion matrix, in percent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from stego_core.config.schema import DataConfig
from stego_core.errors import InputError, ShapeError
from stego_core.metrics.matching import check_confusion, many_to_one, match_clusters


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """How well predictions agree with labels."""

    miou: float
    """Mean of the IoUs that aren't NaN, percent; NaN if there are none."""
    accuracy: float
    """Share of scored pixels that are right, percent; NaN without scored pixels."""
    iou: dict[int, float]
    """IoU of each scored class, percent; NaN for a class that is neither labelled nor predicted."""
    matching: dict[int, int]
    """Class of each matched cluster (of each predicted class: itself)."""


def scored_classes(
    data: DataConfig, confusion: npt.NDArray[np.int64], *, num_named: int = 0
) -> list[int]:
    """Return the classes to score: those chosen, else the named ones and those that occur.

    A class that has a name and no labelled pixel is scored, too: with predicted pixels its IoU is
    0, without it is NaN and not in the mean.

    Args:
        data: `score_classes` and `ignore_classes`.
        confusion: counts, (num_classes, num_clusters), oriented [true, pred].
        num_named: classes of `classes.txt`.

    Raises:
        InputError: if no pixel of these classes was counted.

    Example:
        >>> scored_classes(DataConfig(ignore_classes=(2,)), np.array([[0, 0], [3, 1], [5, 0]]))
        [1]
    """
    present = np.flatnonzero(confusion.sum(1)).tolist()
    named = range(min(num_named, len(confusion)))
    wanted = set(data.score_classes) or {*named, *present}
    classes = sorted(wanted - set(data.ignore_classes))
    if not confusion[classes].sum():
        raise InputError(
            "no labelled pixel is left to score: check --data.score-classes, "
            "--data.ignore-classes and the label files"
        )
    return classes


def score_clusters(
    confusion: npt.NDArray[np.int64],
    *,
    classes: Sequence[int] | None = None,
    matching: Literal["hungarian", "many_to_one"] = "hungarian",
    dropped_extra: bool = False,
) -> Scores:
    """Score clusters against labels after matching them to classes.

    Args:
        confusion: counts, (num_classes, num_clusters), oriented [true, pred].
        classes: the classes to score; pixels of other classes don't count. None: all rows.
        matching: `hungarian` gives each class at most one cluster, `many_to_one` any number.
        dropped_extra: score as the original does: pixels in clusters numbered beyond the classes
            don't count, and the clusters without a class are together one more class of IoU 0
            wherever they have pixels.

    Returns:
        The scores. Pixels in clusters without a class are errors; there is no class for them, so
        they lower accuracy and the IoU of their true class only.

    Raises:
        ShapeError: if `confusion` isn't a matrix of counts or `classes` aren't different rows.
    Source: Hamilton et al. 2022, section 4. The original drops pixels of extra clusters and
        counts these as a class of IoU 0; here neither happens.

    Example:
        >>> import numpy as np
        >>> scores = score_clusters(np.array([[1, 9, 0], [5, 2, 3]]))
        >>> scores.matching, scores.accuracy
        ({0: 1, 1: 0}, 70.0)
    """
    classes = range(len(confusion)) if classes is None else classes
    match = match_clusters if matching == "hungarian" else many_to_one
    if dropped_extra:
        check_confusion(confusion, classes)
        confusion = confusion.copy()
        confusion[:, len(classes) :] = 0
    scores = _score(confusion, classes, match(confusion, classes))
    return _with_extra_class(scores, confusion[list(classes)]) if dropped_extra else scores


def score_classes(confusion: npt.NDArray[np.int64], classes: Sequence[int] | None = None) -> Scores:
    """Score predictions that are class ids already, such as those of the linear probe.

    Args:
        confusion: counts, (num_classes, num_classes), oriented [true, pred].
        classes: the classes to score; pixels of other classes don't count, and predicting one of
            those is an error. None: all rows.

    Returns:
        The scores, with every class matched to itself.

    Raises:
        ShapeError: if `confusion` isn't a square matrix of counts or `classes` aren't different
            rows.

    Example:
        >>> import numpy as np
        >>> score_classes(np.array([[9, 1], [2, 8]])).accuracy
        85.0
    """
    classes = range(len(confusion)) if classes is None else classes
    check_confusion(confusion, classes)
    if confusion.shape[0] != confusion.shape[1]:
        raise ShapeError(f"a confusion of classes has shape {confusion.shape}: give a square one")
    return _score(confusion, classes, {int(row): int(row) for row in classes})


def _score(
    confusion: npt.NDArray[np.int64], classes: Sequence[int], matching: Mapping[int, int]
) -> Scores:
    scored = confusion[list(classes)]
    labelled, predicted = scored.sum(axis=1), scored.sum(axis=0)
    iou, num_right = {}, 0
    for row, class_id in enumerate(classes):
        clusters = [cluster for cluster, matched in matching.items() if matched == class_id]
        both = int(scored[row, clusters].sum())
        either = int(labelled[row]) + int(predicted[clusters].sum()) - both
        iou[int(class_id)] = _percent(both, either)
        num_right += both
    present = [value for value in iou.values() if not math.isnan(value)]
    return Scores(
        miou=math.fsum(present) / len(present) if present else math.nan,
        accuracy=_percent(num_right, int(scored.sum())),
        iou=iou,
        matching=dict(matching),
    )


def _with_extra_class(scores: Scores, scored: npt.NDArray[np.int64]) -> Scores:
    """Return the scores with one more class of IoU 0 if clusters without a class have pixels."""
    unmatched = [cluster for cluster in range(scored.shape[1]) if cluster not in scores.matching]
    if not scored[:, unmatched].sum():
        return scores
    present = sum(not math.isnan(value) for value in scores.iou.values())
    return replace(scores, miou=scores.miou * present / (present + 1) if present else 0.0)


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else math.nan

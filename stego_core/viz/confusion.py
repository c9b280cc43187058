"""Which classes share clusters: the confusion of an evaluation as a chart of the report.

Tables come from `evaluate.py`'s output, which somebody may have changed: names are shown as text.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np

from stego_core.errors import SchemaError
from stego_core.storage import fs
from stego_core.viz.charts import INK, MUTED, heat_cell, svg, text
from stego_core.viz.tables import plain_rows

_MOST = 60  # classes; with more nothing can be read
_CELL, _LEFT, _TOP, _RIGHT = 30, 130, 130, 66
_LEAST_SHOWN = 0.05  # share of a class that has its number written


@dataclass(frozen=True, slots=True)
class ConfusionFacts:
    """Where the pixels of each class are.

    Attributes:
        classes: names of the scored classes.
        iou: of each, percent; NaN where it isn't defined.
        shares: (classes, classes + 1): share of a row's pixels that is in the cluster matched to
            the column's class; the last column has the clusters without a class.
    """

    classes: list[str]
    iou: list[float]
    shares: np.ndarray


def read_confusion(metrics_uri: str) -> ConfusionFacts | None:
    """Return the confusion of the clusters in an evaluation's output; None if it isn't there.

    Raises:
        SchemaError: if a table can't be read, or the files don't fit together.
    """
    protocol = fs.read_if_exists(fs.join(metrics_uri, "protocol.json"))
    names = ("metrics", "confusion-cluster")
    scores, pixels = (
        plain_rows(fs.join(metrics_uri, "metrics", f"{name}.parquet")) for name in names
    )
    if protocol is None or not scores or not pixels:
        return None
    try:
        told = json.loads(protocol)
        classes = [int(one) for one in told["classes"]]
        called = [str(one) for one in told.get("class_names") or classes]
        rows = {
            row["class_id"]: row
            for row in scores
            if (row["head"], row["matching"], row["metric"]) == ("cluster", "hungarian", "iou")
        }
        column = {rows[one]["cluster_id"]: place for place, one in enumerate(classes)}
        counts = np.zeros((len(classes), len(classes) + 1))
        for cell in pixels:
            place = column.get(cell["predicted"], len(classes))
            counts[classes.index(cell["true_class"]), place] += int(cell["pixels"])
        iou = [
            float("nan" if rows[one]["value"] is None else rows[one]["value"]) for one in classes
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise SchemaError(f"the tables of {metrics_uri} do not fit together: {error!r}") from error
    if len(called) != len(classes) or not 0 < len(classes) <= _MOST:
        return None
    totals = counts.sum(1, keepdims=True)
    return ConfusionFacts(called, iou, counts / np.maximum(totals, 1))


def confusion_svg(facts: ConfusionFacts) -> str:
    """Return a row for each class: the share of its pixels in each matched cluster, and its IoU."""
    count = len(facts.classes)
    parts = [text(_LEFT + (count + 1) * _CELL + 8, _TOP - 6, "IoU", color=MUTED)]
    for place, name in enumerate([*facts.classes, "no class"]):
        middle = _LEFT + (place + 0.5) * _CELL
        turn = f'transform="translate({middle + 4:g},{_TOP - 6}) rotate(-60)"'
        color = INK if place < count else MUTED
        parts.append(f"<g {turn}>{text(0, 0, _short(name), color=color)}</g>")
    for row, name in enumerate(facts.classes):
        y = _TOP + row * _CELL
        parts.append(text(_LEFT - 6, y + _CELL / 2 + 4, _short(name), anchor="end"))
        for place in range(count + 1):
            share = float(facts.shares[row, place])
            label = f"{100 * share:.0f}" if share >= _LEAST_SHOWN else ""
            x = _LEFT + place * _CELL
            parts.append(heat_cell(x, y, share, label, size=_CELL - 2, is_own=row == place))
        iou = facts.iou[row]
        shown = "–" if math.isnan(iou) else f"{iou:.1f}"
        parts.append(text(_LEFT + (count + 1) * _CELL + 8, y + _CELL / 2 + 4, shown))
    width, height = _LEFT + (count + 1) * _CELL + _RIGHT, _TOP + count * _CELL + 8
    return svg(width, height, parts)


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"

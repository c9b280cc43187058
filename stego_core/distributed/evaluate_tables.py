"""What an evaluation leaves: metrics of every head, confusion and image tables, the protocol."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from math import isnan
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from stego_core.config.schema import EvaluateJob
from stego_core.datasets.directory import Dataset
from stego_core.errors import ImageProblem, InputError
from stego_core.metrics.images import image_scores
from stego_core.metrics.scores import Scores, score_classes, score_clusters, scored_classes
from stego_core.model.segmenter import CLASSIFIERS, CLUSTER
from stego_core.storage import fs
from stego_core.storage.parquet import table_bytes
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)

_MATCHINGS: tuple[Literal["hungarian", "many_to_one"], ...] = ("hungarian", "many_to_one")
_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("head", pa.string()),
        ("matching", pa.string()),
        ("crf", pa.bool_()),
        ("flip", pa.bool_()),
        ("metric", pa.string()),
        ("class_id", pa.int32()),
        ("cluster_id", pa.int32()),
        ("value", pa.float64()),
    ]
)


@dataclass(slots=True)
class Counted:
    """What was counted over a split.

    Attributes:
        totals: confusion matrix of each head, oriented [true, pred].
        images: cells of the clusters' confusion in each image with labels, by URI.
        unlabelled: images that could be decoded and have no usable label file.
        failed: rows of the quarantine table: images and labels that can't be used.
        precision: that all workers computed in.
        passes: of the backbone: `read` from a store, `kept` there, or only `computed`.
    """

    totals: dict[str, np.ndarray] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    unlabelled: int = 0
    failed: list[dict[str, Any]] = field(default_factory=list)
    precision: str = ""
    passes: Counter[str] = field(default_factory=Counter)

    def add(self, receipt: dict[str, Any]) -> None:
        """Add what one unit's receipt says."""
        for head, counts in receipt["confusion"].items():
            self.totals[head] = self.totals.get(head, 0) + np.array(counts, np.int64)
        # Arrays, not the lists of the receipt: a split may have a hundred thousand images.
        self.images |= {
            uri: np.array(cells, np.int64).reshape(-1, 3)
            for uri, cells in receipt["images"].items()
        }
        self.unlabelled += receipt["statuses"].get(ImageProblem.OK, 0) - len(receipt["images"])
        self.failed += receipt["failed"] + receipt["failed_labels"]
        self.passes.update(receipt["passes"])


def write_tables(job: EvaluateJob, run: RunDirectory, dataset: Dataset, counted: Counted) -> None:
    """Write `metrics.json`, `protocol.json` and the tables in `metrics/`, and log the scores.

    Raises:
        InputError: if no image had a usable label file.
    """
    totals, dropped = counted.totals, job.compat.dropped_extra_clusters
    if not totals:
        raise InputError(f"none of the images in {dataset.images_uri} has a usable label file")
    named = len(dataset.class_names)
    classes = scored_classes(job.data, totals[CLUSTER], num_named=named)
    flat: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for head, confusion in totals.items():
        scored = _scored(head, confusion, classes, dropped_extra=dropped)
        for matching, scores in scored.items():
            name = head if matching != "many_to_one" else f"{head}.many_to_one"
            flat |= {f"{name}.miou": scores.miou, f"{name}.accuracy": scores.accuracy}
            rows += _rows(job, head, matching, scores)
        _write_confusion(run, head, confusion[classes], classes)
        if head == CLUSTER:
            matched = scored["hungarian"].matching
            images = image_scores(
                counted.images, classes=classes, matching=matched, dropped_extra=dropped
            )
            _write_table(run, "images", images)
    _write_table(run, "metrics", pa.Table.from_pylist(rows, _SCHEMA))
    run.write_json(
        "metrics.json", {key: round(value, 4) for key, value in flat.items() if not isnan(value)}
    )
    run.write_json("protocol.json", _protocol(job, classes, counted, dataset))
    run.count(scored=len(counted.images), unlabelled=counted.unlabelled)
    for head in totals:
        miou, accuracy = flat[f"{head}.miou"], flat[f"{head}.accuracy"]
        logger.info("%s: mIoU %.2f %%, accuracy %.2f %%", head, miou, accuracy)


def _scored(
    head: str, confusion: np.ndarray, classes: list[int], *, dropped_extra: bool
) -> dict[str, Scores]:
    """Return the scores of a head by the way its clusters are matched."""
    if head in CLASSIFIERS:
        return {"identity": score_classes(confusion, classes=classes)}
    return {
        how: score_clusters(confusion, classes=classes, matching=how, dropped_extra=dropped_extra)
        for how in _MATCHINGS
    }


def _rows(job: EvaluateJob, head: str, matching: str, scores: Scores) -> list[dict[str, Any]]:
    common: dict[str, Any] = {"split": job.data.split, "head": head, "matching": matching}
    common |= {"crf": job.crf, "flip": job.flip}
    clusters = {class_id: cluster for cluster, class_id in scores.matching.items()}
    rows: list[dict[str, Any]] = [
        common | {"metric": "miou", "value": scores.miou},
        common | {"metric": "accuracy", "value": scores.accuracy},
    ]
    rows += [
        common | {"metric": "iou", "class_id": c, "cluster_id": clusters.get(c), "value": value}
        for c, value in scores.iou.items()
    ]
    return rows


def _write_confusion(
    run: RunDirectory, head: str, confusion: np.ndarray, classes: list[int]
) -> None:
    true, predicted = np.nonzero(confusion)
    table = pa.table(
        {
            "true_class": np.array(classes, np.int32)[true],
            "predicted": predicted.astype(np.int32),
            "pixels": confusion[true, predicted],
        }
    )
    _write_table(run, f"confusion-{head}", table)


def _write_table(run: RunDirectory, name: str, table: pa.Table) -> None:
    fs.write_bytes(run.path("metrics", f"{name}.parquet"), table_bytes(table))


def _protocol(
    job: EvaluateJob, classes: list[int], counted: Counted, dataset: Dataset
) -> dict[str, Any]:
    """Return what has to be said next to the numbers."""
    return {
        "images": len(counted.images),
        "images_without_labels": counted.unlabelled,
        "images_uri": dataset.images_uri,
        "classes": classes,
        "class_names": [dict(enumerate(dataset.class_names)).get(c, f"class {c}") for c in classes],
        "matching": "one global Hungarian matching over the whole split",
        "crop": "centre square, images and labels resized to predict.resolution"
        if job.compat.centre_crop
        else "none: whole images, aspect ratio kept, scored at label size",
        "compat": asdict(job.compat),
        "predict": asdict(job.predict),
        "crf": job.crf,
        "flip": job.flip,
        "precision": counted.precision,
    }

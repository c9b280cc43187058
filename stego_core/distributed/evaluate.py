"""Scoring a model against labels: one global confusion matrix for each head, summed over units."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isnan
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from stego_core.config.compat import MineCompat
from stego_core.config.load import dump_toml
from stego_core.config.schema import EvaluateJob, ViewConfig
from stego_core.datasets.demo import DEMO
from stego_core.datasets.directory import Dataset, open_dataset
from stego_core.distributed.cluster import connect, plan_actors
from stego_core.distributed.data import check_data, plan_check, select_images
from stego_core.distributed.evaluate_stages import EvaluateWorker, fetch_labelled, pass_on
from stego_core.distributed.fetch import Prepare, SquareViews, WholeImage
from stego_core.distributed.precision import settle_precision
from stego_core.distributed.progress import Progress
from stego_core.distributed.units import Stage, run_units, units_at_once
from stego_core.errors import ImageProblem, InputError
from stego_core.inference.crf import require_crf
from stego_core.metrics.images import image_scores
from stego_core.metrics.scores import Scores, score_classes, score_clusters, scored_classes
from stego_core.model.checkpoint import find_model, load_tensors
from stego_core.model.registry import find_backbone
from stego_core.model.segmenter import CLASSIFIERS, CLUSTER
from stego_core.storage import fs
from stego_core.storage.lease import Lease, hold
from stego_core.storage.manifest import Manifest, write_manifest
from stego_core.storage.parquet import table_bytes
from stego_core.storage.run import RunDirectory
from stego_core.training.views import view_side

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


def plan_evaluate(job: EvaluateJob) -> list[str]:
    """Return what a run would do, one line each, without touching anything."""
    dataset = _labelled(job)
    files = select_images(job.data, dataset)
    return [
        f"model: {find_model(job.model)}",
        f"images: {dataset.images_uri}: {len(files)}",
        f"labels: {dataset.labels_uri}",
        *plan_check(job.data, dataset, files, job.limits),
        f"crf: {job.predict.crf if job.crf else 'off'}, flip: {'on' if job.flip else 'off'}",
    ]


def _labelled(job: EvaluateJob) -> Dataset:
    if job.data.root == DEMO:
        raise InputError("the demo pictures have no labels: give --data.root with labels/<split>/")
    dataset = open_dataset(job.data.root, job.data.split)
    if dataset.labels_uri is None:
        raise InputError(
            f"{job.data.root} has no labels/{job.data.split}/: evaluation needs label files, "
            "segment_bucket.py does not"
        )
    return dataset


def _checked(job: EvaluateJob, run: RunDirectory) -> tuple[Dataset, Sequence[fs.ListedFile]]:
    """Return the labelled data set and its images, at least one of which has a label file."""
    dataset = _labelled(job)
    files = select_images(job.data, dataset)
    if not check_data(run, job.data, dataset, files, job.limits).pairs:
        raise InputError(
            f"none of the {len(files)} images in {dataset.images_uri} has a label file"
        )
    return dataset, files


def evaluate(job: EvaluateJob, run: RunDirectory) -> None:
    """Score `job.model` on a labelled split; write `metrics.json` and `metrics/`.

    Raises:
        InputError: if there are no images, no labels, or no pixel to score.
        CheckpointError: if there is no model, or another job writes to `job.out`.
    """
    if job.crf:
        require_crf(job.predict.crf)
    folder = find_model(job.model)
    load_tensors(folder, "model")  # damaged files end the job here, before it leaves anything
    with hold(job.out) as lease:
        dataset, files = _checked(job, run)
        fs.write_bytes(run.path("config.resolved.toml"), dump_toml(job).encode())
        manifest = write_manifest(
            run.path("evaluate-manifest.parquet"), files, unit_images=job.predict.unit_images
        )
        counted = _count(job, run, folder, dataset, manifest, lease)
        _report(job, run, dataset, counted)


@dataclass(slots=True)
class _Counted:
    """What was counted over a split.

    Attributes:
        totals: confusion matrix of each head, oriented [true, pred].
        images: cells of the clusters' confusion in each image with labels, by URI.
        unlabelled: images that could be decoded and have no usable label file.
        precision: that all workers computed in.
    """

    totals: dict[str, np.ndarray] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    unlabelled: int = 0
    precision: str = ""


def _count(
    job: EvaluateJob,
    run: RunDirectory,
    folder: str,
    dataset: Dataset,
    manifest: Manifest,
    lease: Lease,
) -> _Counted:
    card = json.loads(fs.read_bytes(fs.join(folder, "model.json")))
    patch = find_backbone(card["backbone"]["name"]).patch_size
    found = _Counted()
    done: set[int] = set()
    fetch = {"manifest": manifest, "prepare": _prepare(job, patch)}
    run.status("running", stage="evaluate")
    with connect(debug=job.debug):
        actors = plan_actors(job.actors)
        found.precision = settle_precision(run, job.precision, is_kept=False)
        progress = Progress(
            run, stage="evaluate", total=manifest.num_images, at_once=units_at_once(actors)
        )
        receipts = run_units(
            lambda: [unit for unit in range(manifest.num_units) if unit not in done],
            fetch=Stage(fetch_labelled, fetch | {"limits": job.limits, "dataset": dataset}),
            work=Stage(
                EvaluateWorker,
                {
                    "model": folder,
                    "precision": found.precision,
                    "device": actors.device,
                    "threads": actors.threads,
                    "job": job,
                },
                probe=EvaluateWorker,
            ),
            finish=Stage(pass_on, {}),
            actors=actors,
            seconds=job.limits.max_seconds,
            debug=job.debug,
        )
        for receipt in receipts:
            lease.check()
            for head, counts in receipt["confusion"].items():
                found.totals[head] = found.totals.get(head, 0) + np.array(counts, np.int64)
            # Arrays, not the lists of the receipt: a split may have a hundred thousand images.
            found.images |= {
                uri: np.array(cells, np.int64).reshape(-1, 3)
                for uri, cells in receipt["images"].items()
            }
            found.unlabelled += receipt["statuses"].get(ImageProblem.OK, 0)
            found.unlabelled -= len(receipt["images"])
            done.add(receipt["unit"])
            progress.add(receipt["statuses"])
        progress.finish()
    return found


def _prepare(job: EvaluateJob, patch: int) -> Prepare:
    resolution, nearest = job.predict.resolution, job.compat.nearest_images
    if job.compat.centre_crop:
        square = ViewConfig(resolution=resolution)
        compat = MineCompat(nearest_images=nearest)
        return SquareViews(square, side=view_side(square, patch), compat=compat)
    return WholeImage(resolution=resolution, patch=patch, nearest=nearest)


def _report(job: EvaluateJob, run: RunDirectory, dataset: Dataset, counted: _Counted) -> None:
    totals, dropped = counted.totals, job.compat.dropped_extra_clusters
    if not totals:
        raise InputError(f"none of the images in {dataset.images_uri} has a usable label file")
    classes = scored_classes(job.data, totals[CLUSTER])
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
    job: EvaluateJob, classes: list[int], counted: _Counted, dataset: Dataset
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

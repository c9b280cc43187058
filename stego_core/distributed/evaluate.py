"""Scoring a model against labels: one global confusion matrix for each head, summed over units."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import asdict
from math import isnan
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from stego_core.config.load import dump_toml
from stego_core.config.schema import EvaluateJob, ImageLimits
from stego_core.datasets.demo import DEMO
from stego_core.datasets.directory import Dataset, open_dataset
from stego_core.distributed.cluster import connect, plan_actors
from stego_core.distributed.fetch import WholeImage, fetch_unit, pixel_groups, read_with_retry
from stego_core.distributed.progress import Progress
from stego_core.distributed.units import Stage, run_units
from stego_core.errors import InputError
from stego_core.images.decode import ImageFailure, decode_label
from stego_core.images.geometry import resize_labels
from stego_core.inference.crf import refine, require_crf, upsampled_log_probs
from stego_core.inference.predict import upsampled_argmax
from stego_core.metrics.confusion import confusion_matrix
from stego_core.metrics.scores import Scores, score_classes, score_clusters
from stego_core.model.checkpoint import find_model
from stego_core.model.registry import find_backbone
from stego_core.model.segmenter import BASELINE, CLUSTER, LINEAR, Segmenter, load_segmenter
from stego_core.storage import fs
from stego_core.storage.manifest import list_images, write_manifest
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)

# Label values are counted as they are and selected afterwards, so one pass serves every selection.
MAX_CLASSES = 255
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
    files = list_images(dataset.images_uri, limit=job.data.limit)
    return [
        f"model: {find_model(job.model)}",
        f"images: {dataset.images_uri}: {len(files)}",
        f"labels: {dataset.labels_uri}",
        f"crf: {'on' if job.crf else 'off'}, flip: {'on' if job.flip else 'off'}",
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


def evaluate(job: EvaluateJob, run: RunDirectory) -> None:
    """Score `job.model` on a labelled split; write `metrics.json` and `metrics/metrics.parquet`.

    Raises:
        InputError: if there are no images, no labels, or no pixel to score.
        CheckpointError: if there is no model.
    """
    if job.crf:
        require_crf()
    folder = find_model(job.model)
    dataset = _labelled(job)
    files = list_images(dataset.images_uri, limit=job.data.limit)
    fs.write_bytes(run.path("config.resolved.toml"), dump_toml(job).encode())
    manifest = write_manifest(
        run.path("evaluate-manifest.parquet"), files, unit_images=job.predict.unit_images
    )
    card = json.loads(fs.read_bytes(fs.join(folder, "model.json")))
    patch = find_backbone(card["backbone"]["name"]).patch_size
    totals: dict[str, np.ndarray] = {}
    scored = 0
    done: set[int] = set()
    run.status("running", stage="evaluate")
    with connect(debug=job.debug):
        actors = plan_actors(job.actors)
        progress = Progress(run, stage="evaluate", total=manifest.num_images)
        receipts = run_units(
            lambda: [unit for unit in range(manifest.num_units) if unit not in done],
            fetch=Stage(
                fetch_labelled,
                {
                    "manifest": manifest,
                    "prepare": WholeImage(resolution=job.predict.resolution, patch=patch),
                    "limits": job.limits,
                    "dataset": dataset,
                },
            ),
            work=Stage(
                EvaluateWorker,
                {
                    "model": folder,
                    "precision": job.precision,
                    "device": actors.device,
                    "threads": actors.threads,
                    "job": job,
                },
            ),
            finish=Stage(pass_on, {}),
            actors=actors,
            debug=job.debug,
        )
        for receipt in receipts:
            for head, counts in receipt["confusion"].items():
                totals[head] = totals.get(head, 0) + np.array(counts, np.int64)
            scored += receipt["scored"]
            done.add(receipt["unit"])
            progress.add(receipt["statuses"])
        progress.finish()
    _report(job, run, dataset, totals, scored)


def fetch_labelled(
    unit: int, *, manifest: Any, prepare: Any, limits: ImageLimits, dataset: Dataset
) -> pa.Table:
    """Return `fetch_unit`'s table and the label file of each image, null where there is none."""
    table = fetch_unit(unit, manifest=manifest, prepare=prepare, limits=limits)
    labels = [read_with_retry(dataset.label_uri(path)) for path in table["path"].to_pylist()]
    column = [None if isinstance(label, ImageFailure) else label for label in labels]
    return table.append_column("label", pa.array(column, pa.large_binary()))


class EvaluateWorker:
    """The actor's part: label maps of all heads at label size, counted against the labels.

    Args:
        model: folder of the model.
        precision: `fp32` or `bf16`.
        device: of torch.
        threads: of torch.
        job: the settings.
    """

    def __init__(
        self, *, model: str, precision: str, device: str, threads: int, job: EvaluateJob
    ) -> None:
        torch.set_num_threads(threads)
        self._segmenter: Segmenter = load_segmenter(model, precision=precision, device=device)
        self._device, self._job = device, job
        self._heads = [CLUSTER, BASELINE] + ([LINEAR] if self._segmenter.linear else [])

    def __call__(self, unit: int, table: pa.Table) -> pa.Table:
        """Return the unit's receipt: statuses and the confusion matrix of each head."""
        confusion: dict[str, np.ndarray] = {}
        scored = 0
        for rows, pixels in pixel_groups(table, self._job.predict.batch):
            batch = torch.from_numpy(pixels).to(self._device)
            features, code = self._segmenter.encode(batch, flip=self._job.flip)
            for index, row in enumerate(rows):
                data = table["label"][row].as_py()
                labels = None if data is None else decode_label(data, self._job.limits)
                if labels is None or isinstance(labels, ImageFailure):
                    continue
                scored += 1
                for head in self._heads:
                    maps = (features if head == BASELINE else code)[index : index + 1]
                    predicted = self._label_map(head, maps, pixels[index], labels.shape)
                    counts = self._count(labels, predicted, head)
                    confusion[head] = confusion.get(head, 0) + counts
        statuses = table["status"].value_counts().to_pylist()
        record = {
            "unit": unit,
            "statuses": {entry["values"]: entry["counts"] for entry in statuses},
            "scored": scored,
            "confusion": {head: counts.tolist() for head, counts in confusion.items()},
        }
        return pa.table({"receipt": [json.dumps(record)]})

    def _label_map(
        self, head: str, maps_1Chw: Tensor, pixels: np.ndarray, shape: tuple[int, ...]
    ) -> np.ndarray:
        products = self._segmenter.products(maps_1Chw, head)[0]
        if not self._job.crf:
            return upsampled_argmax(products, shape[0], shape[1])
        height, width = pixels.shape[:2]
        log_probs = upsampled_log_probs(
            products.cpu(),
            maps_1Chw[0].cpu(),
            height=height,
            width=width,
            alpha=self._job.predict.alpha,
            is_cosine=head != LINEAR,
        )
        return resize_labels(refine(pixels, log_probs), shape[0], shape[1])

    def _count(self, labels: np.ndarray, predicted: np.ndarray, head: str) -> np.ndarray:
        # The linear probe predicts class ids: a square matrix. Clusters have ids of their own.
        columns = MAX_CLASSES if head == LINEAR else self._segmenter.num_clusters
        return confusion_matrix(labels, predicted, num_classes=MAX_CLASSES, num_clusters=columns)


def pass_on(unit: int, table: pa.Table) -> pa.Table:
    """Return the receipt as it is: nothing is left to do after counting."""
    return table


def _scored_classes(job: EvaluateJob, confusion: np.ndarray) -> list[int]:
    present = np.flatnonzero(confusion.sum(1))
    wanted = set(job.data.score_classes) or set(present.tolist())
    classes = sorted(wanted - set(job.data.ignore_classes))
    if not confusion[classes].sum():
        raise InputError(
            "no labelled pixel is left to score: check --data.score-classes, "
            "--data.ignore-classes and the label files"
        )
    return classes


def _report(
    job: EvaluateJob,
    run: RunDirectory,
    dataset: Dataset,
    totals: dict[str, np.ndarray],
    scored: int,
) -> None:
    if not totals:
        raise InputError(f"none of the images in {dataset.images_uri} has a label file")
    classes = _scored_classes(job, totals[CLUSTER])
    flat: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for head, confusion in totals.items():
        for matching in ("hungarian", "many_to_one") if head != LINEAR else ("identity",):
            if head == LINEAR:
                scores = score_classes(confusion, classes=classes)
            else:
                scores = score_clusters(confusion, classes=classes, matching=matching)
            name = head if matching != "many_to_one" else f"{head}.many_to_one"
            flat |= {f"{name}.miou": scores.miou, f"{name}.accuracy": scores.accuracy}
            rows += _rows(job, head, matching, scores)
        _write_confusion(run, head, confusion[classes], classes)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), buffer, compression="zstd")
    fs.write_bytes(run.path("metrics", "metrics.parquet"), buffer.getvalue())
    run.write_json(
        "metrics.json", {key: round(value, 4) for key, value in flat.items() if not isnan(value)}
    )
    run.write_json("protocol.json", _protocol(job, classes, scored, dataset))
    run.count(scored=scored)
    for head in totals:
        miou, accuracy = flat[f"{head}.miou"], flat[f"{head}.accuracy"]
        logger.info("%s: mIoU %.2f %%, accuracy %.2f %%", head, miou, accuracy)


def _rows(job: EvaluateJob, head: str, matching: str, scores: Scores) -> list[dict[str, Any]]:
    common = {
        "split": job.data.split,
        "head": head,
        "matching": matching,
        "crf": job.crf,
        "flip": job.flip,
    }
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
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    fs.write_bytes(run.path("metrics", f"confusion-{head}.parquet"), buffer.getvalue())


def _protocol(
    job: EvaluateJob, classes: list[int], scored: int, dataset: Dataset
) -> dict[str, Any]:
    """Return what has to be said next to the numbers."""
    return {
        "images": scored,
        "images_uri": dataset.images_uri,
        "classes": classes,
        "matching": "one global Hungarian matching over the whole split",
        "crop": "none: whole images, aspect ratio kept, scored at label size",
        "predict": asdict(job.predict),
        "crf": job.crf,
        "flip": job.flip,
    }

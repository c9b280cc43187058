"""The stages of evaluation that run on workers: label maps of all heads, counted against labels."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from stego_core.config.schema import EvaluateJob, EvaluateStoreConfig, ImageLimits
from stego_core.datasets.directory import Dataset
from stego_core.distributed.fetch import fetch_unit, pixel_groups, read_or_reason
from stego_core.distributed.units import map_threads
from stego_core.errors import ImageProblem
from stego_core.images.decode import ImageFailure, decode_label
from stego_core.images.geometry import Box, centre_square, resize_labels
from stego_core.inference.crf import refine, refine_batch, upsampled_log_probs
from stego_core.inference.encode import encode_images
from stego_core.inference.predict import upsampled_argmax
from stego_core.masks.table import quarantine_table
from stego_core.metrics.confusion import confusion_matrix
from stego_core.metrics.images import count_pairs
from stego_core.model.segmenter import (
    BASELINE,
    CLASSIFIERS,
    CLUSTER,
    Segmenter,
    load_segmenter,
)
from stego_core.model.stored import StoredBackbone

# Label values are counted as they are and selected afterwards, so one pass serves every selection.
MAX_CLASSES = 255
_FAILURE = pa.struct([("problem", pa.string()), ("detail", pa.string())])
_READERS = 8  # labels at a time: reads wait for the network


def fetch_labelled(
    unit: int,
    *,
    manifest: Any,
    prepare: Any,
    limits: ImageLimits,
    dataset: Dataset,
    deaths: int = 0,
) -> pa.Table:
    """Return `fetch_unit`'s table and the label file of each image.

    Returns:
        Also `label` (bytes, null where there is none) and `label_failure` (why one that may be
        there can't be read, as `ImageFailure`'s problem and detail; else null).
    """
    table = fetch_unit(
        unit,
        manifest=manifest,
        prepare=prepare,
        limits=limits,
        root=dataset.images_uri,
        deaths=deaths,
    )
    uris = [dataset.label_uri(path) for path in table["path"].to_pylist()]
    with ThreadPoolExecutor(_READERS) as pool:  # many images may have none, and nobody listed them
        labels = list(pool.map(lambda uri: read_or_reason(uri, is_listed=False), uris))
    files = [None if isinstance(label, ImageFailure) else label for label in labels]
    failures = [
        {"problem": label.problem.value, "detail": label.detail}
        if isinstance(label, ImageFailure) and label.problem != ImageProblem.VANISHED
        else None
        for label in labels
    ]
    table = table.append_column("label", pa.array(files, pa.large_binary()))
    return table.append_column("label_failure", pa.array(failures, _FAILURE))


def label_rows(table: pa.Table, failures: dict[int, ImageFailure]) -> list[dict[str, Any]]:
    """Return rows of the quarantine table for labels that are there, but can't be used.

    Args:
        table: of `fetch_labelled`.
        failures: those that could be read and not decoded, by row.
    """
    unread = enumerate(table["label_failure"].to_pylist())
    reasons = {row: (one["problem"], one["detail"]) for row, one in unread if one is not None}
    reasons |= {row: (one.problem.value, one.detail) for row, one in failures.items()}
    ids, uris = table["image_id"].to_pylist(), table["image_uri"].to_pylist()
    return [
        {
            "image_id": ids[row],
            "image_uri": uris[row],
            "stage": "label",
            "reason": reason,
            "detail": detail,
        }
        for row, (reason, detail) in sorted(reasons.items())
        if table["status"][row].as_py() == ImageProblem.OK
    ]


@dataclass(slots=True)
class _Counts:
    """What a batch or a unit counts.

    Attributes:
        confusion: of each head.
        images: `count_pairs` of each image with labels, by URI.
        failed_labels: those that can't be decoded, by row.
    """

    confusion: dict[str, np.ndarray] = field(default_factory=dict)
    images: dict[str, list[list[int]]] = field(default_factory=dict)
    failed_labels: dict[int, ImageFailure] = field(default_factory=dict)

    def add(self, other: _Counts) -> None:
        for head, counts in other.confusion.items():
            self.confusion[head] = self.confusion.get(head, 0) + counts
        self.images |= other.images
        self.failed_labels |= other.failed_labels


class EvaluateWorker:
    """The actor's part: label maps of all heads at label size, counted against the labels.

    Args:
        model: folder of the model.
        precision: `fp32` or `bf16`.
        device: of torch.
        threads: batches computed at a time.
        job: the settings.
    """

    def __init__(
        self, *, model: str, precision: str, device: str, threads: int, job: EvaluateJob
    ) -> None:
        self._segmenter: Segmenter = load_segmenter(
            model, weights=job.weights, precision=precision, device=device
        )
        self._stored: StoredBackbone | None = None
        if job.store.uri is not None:
            settings = self._segmenter.card["backbone"]
            self._stored = StoredBackbone(self._segmenter.backbone, job.store.uri, settings)
            self._segmenter.add_module("backbone", self._stored)
        self._device, self._threads, self._job = device, threads, job
        self._refines_here = job.crf and job.predict.crf_device == "model"
        self._heads = [CLUSTER]
        self._heads += [BASELINE] if self._segmenter.has_baseline else []
        self._heads += list(self._segmenter.classifiers)

    def __call__(self, unit: int, table: pa.Table) -> pa.Table:
        """Return the unit's receipt: statuses, failures, and what was counted."""
        groups = pixel_groups(table, self._job.predict.batch)
        counted = map_threads(lambda group: self._count_group(table, *group), groups, self._threads)
        total = _Counts()
        for one in counted:
            total.add(one)
        statuses = table["status"].value_counts().to_pylist()
        columns = ["image_id", "image_uri", "status", "detail"]
        record = {
            "unit": unit,
            "failed": quarantine_table(table.select(columns), stage="evaluate").to_pylist(),
            "statuses": {entry["values"]: entry["counts"] for entry in statuses},
            "failed_labels": label_rows(table, total.failed_labels),
            "images": total.images,
            "confusion": {head: counts.tolist() for head, counts in total.confusion.items()},
            "passes": {} if self._stored is None else self._stored.take_counts(),
        }
        return pa.table({"receipt": [json.dumps(record)]})

    def _count_group(self, table: pa.Table, rows: list[int], pixels: np.ndarray) -> _Counts:
        """Return what a batch of the unit counts."""
        batch = torch.from_numpy(pixels).to(self._device)
        features, code = encode_images(
            self._segmenter, batch, self._job.predict, flip=self._job.flip
        )
        found = _Counts()
        labels: dict[int, np.ndarray] = {}  # by place in the batch
        for index, row in enumerate(rows):
            decoded = self._label(table["label"][row].as_py(), pixels.shape[1:3])
            if isinstance(decoded, ImageFailure):
                found.failed_labels[row] = decoded
            elif decoded is not None:
                labels[index] = decoded
        refined: dict[str, np.ndarray] = {}
        if self._refines_here and labels:
            scored = [*labels]
            refined = self._refined(batch[scored], features[scored], code[scored])
        for place, (index, true) in enumerate(labels.items()):
            for head in self._heads:
                if head in refined:
                    predicted = resize_labels(refined[head][place], *true.shape)
                else:
                    one = slice(index, index + 1)
                    maps = self._segmenter.seen_by(head, features[one], code[one])
                    predicted = self._label_map(head, maps, pixels[index], true.shape)
                counts = self._count(true, predicted, head)
                found.add(_Counts({head: counts}))
                if head == CLUSTER:
                    uri = table["image_uri"][rows[index]].as_py()
                    found.images[uri] = count_pairs(counts).tolist()
        return found

    def _label(self, data: bytes | None, size: tuple[int, int]) -> np.ndarray | ImageFailure | None:
        """Return a label map as it is scored; None where there is none."""
        decoded = None if data is None else decode_label(data, self._job.limits)
        if decoded is None or isinstance(decoded, ImageFailure):
            return decoded
        if self._job.compat.centre_crop:
            return resize_labels(decoded, *size, box=centre_square(Box(0, 0, *decoded.shape)))
        return decoded

    def _refined(
        self, pixels_BHWC: Tensor, features_BChw: Tensor, code_BKhw: Tensor
    ) -> dict[str, np.ndarray]:
        """Return the CRF's label maps of each head, computed on the model's device."""
        found = {}
        for head in self._heads:
            maps = self._segmenter.seen_by(head, features_BChw, code_BKhw)
            found[head] = refine_batch(
                pixels_BHWC,
                self._segmenter.products(maps, head),
                maps,
                alpha=self._job.predict.alpha,
                is_cosine=head not in CLASSIFIERS,
            )
        return found

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
            is_cosine=head not in CLASSIFIERS,
        )
        refined = refine(pixels, log_probs, self._job.predict.crf)
        return resize_labels(refined, shape[0], shape[1])

    def _count(self, labels: np.ndarray, predicted: np.ndarray, head: str) -> np.ndarray:
        # Linear probes predict class ids: a square matrix. Clusters have ids of their own.
        columns = MAX_CLASSES if head in CLASSIFIERS else self._segmenter.num_clusters
        return confusion_matrix(labels, predicted, num_classes=MAX_CLASSES, num_clusters=columns)


def without_store(*, job: EvaluateJob, **kwargs: Any) -> EvaluateWorker:
    """Return a worker that computes all and writes nothing: the probe of the stage."""
    return EvaluateWorker(job=replace(job, store=EvaluateStoreConfig()), **kwargs)


def pass_on(unit: int, table: pa.Table) -> pa.Table:
    """Return the receipt as it is: nothing is left to do after counting."""
    return table

"""The stages of bulk segmentation that run on workers: the model, and what follows it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from stego_core.config.schema import SegmentJob
from stego_core.distributed.fetch import pixel_groups
from stego_core.distributed.units import map_threads, receipt_table
from stego_core.errors import ImageProblem
from stego_core.images.geometry import resize_labels
from stego_core.inference.crf import refine, upsampled_log_probs
from stego_core.inference.encode import encode_code
from stego_core.inference.predict import grid_confidence, upsampled_argmax
from stego_core.masks.table import SCHEMA, Segmentation, segmented_row, to_parquet
from stego_core.model.segmenter import CLUSTER, load_segmenter
from stego_core.storage import fs

_RESULT = pa.schema(
    [
        ("labels", pa.large_binary()),
        ("label_height", pa.int32()),
        ("label_width", pa.int32()),
        ("confidence", pa.large_binary()),
        ("entropy", pa.float32()),
        ("grid_height", pa.int32()),
        ("grid_width", pa.int32()),
        ("products", pa.large_binary()),
        ("norm_code", pa.large_binary()),
    ]
)


def unit_uri(out: str, unit: int) -> str:
    """Return where a unit's rows lie until their shard is complete."""
    return fs.join(out, "_units", f"unit-{unit:08d}.parquet")


class SegmentWorker:
    """The actor's part: pixels to label maps, or to scores where a CRF follows.

    Args:
        model: folder of the model.
        precision: `fp32` or `bf16`.
        device: of torch.
        threads: batches computed at a time.
        job: the settings.
    """

    def __init__(
        self, *, model: str, precision: str, device: str, threads: int, job: SegmentJob
    ) -> None:
        self._segmenter = load_segmenter(model, precision=precision, device=device)
        self._device, self._threads, self._job = device, threads, job

    def __call__(self, unit: int, table: pa.Table) -> pa.Table:
        """Return the unit's rows with label maps in place of pixels."""
        results: list[dict[str, Any]] = [{}] * table.num_rows

        def segment(group: tuple[list[int], np.ndarray]) -> None:
            rows, pixels = group
            batch = torch.from_numpy(pixels).to(self._device)
            code = encode_code(self._segmenter, batch, self._job.predict, flip=self._job.flip)
            products = self._segmenter.products(code, CLUSTER)
            for row, one_products, one_code in zip(rows, products, code, strict=True):
                results[row] = self._result(table, row, one_products, one_code)

        map_threads(segment, pixel_groups(table, self._job.predict.batch), self._threads)
        if not self._job.crf:
            table = table.drop_columns(["pixels"])
        for field in _RESULT:
            column = pa.array([r.get(field.name) for r in results], field.type)
            table = table.append_column(field, column)
        return table

    def _result(self, table: pa.Table, row: int, products: Tensor, code: Tensor) -> dict[str, Any]:
        confidence, entropy = grid_confidence(products, code, alpha=self._job.predict.alpha)
        result: dict[str, Any] = {
            "confidence": confidence.tobytes(),
            "entropy": entropy,
            "grid_height": confidence.shape[0],
            "grid_width": confidence.shape[1],
        }
        if self._job.crf:
            result["products"] = products.cpu().numpy().tobytes()
            result["norm_code"] = code.cpu().numpy().tobytes()
            return result
        kind = "pixel" if self._job.mask_size == "model" else "image"
        height = table[f"{kind}_height"][row].as_py()
        width = table[f"{kind}_width"][row].as_py()
        labels = upsampled_argmax(products, height, width)
        return result | {
            "labels": labels.tobytes(),
            "label_height": height,
            "label_width": width,
        }


def finish_unit(unit: int, table: pa.Table, *, out: str, job: SegmentJob, model: str) -> pa.Table:
    """Refine, encode and write the rows of a unit; return its receipt.

    The unit's file is written in one piece, always with the same bytes: doing it twice does no
    harm.
    """
    rows = [_masks_row(row, job) for row in table.to_pylist()]
    fs.write_bytes(unit_uri(out, unit), to_parquet(pa.Table.from_pylist(rows, SCHEMA), {}))
    return receipt_table(unit=unit, statuses=Counter(row["status"] for row in rows))


def _masks_row(row: dict[str, Any], job: SegmentJob) -> dict[str, Any]:
    if row["status"] != ImageProblem.OK:
        return {name: row.get(name) for name in SCHEMA.names}
    grid = (row["grid_height"], row["grid_width"])
    labels = _refined(row, job) if job.crf else _labels(row)
    segmentation = Segmentation(
        labels=labels,
        confidence=np.frombuffer(row["confidence"], np.float32).reshape(grid),
        entropy=row["entropy"],
    )
    known = {name: row.get(name) for name in SCHEMA.names}
    return known | segmented_row(segmentation)


def _labels(row: dict[str, Any]) -> np.ndarray:
    shape = (row["label_height"], row["label_width"])
    dtype = np.uint8 if len(row["labels"]) == shape[0] * shape[1] else np.uint16
    return np.frombuffer(row["labels"], dtype).reshape(shape)


def _refined(row: dict[str, Any], job: SegmentJob) -> np.ndarray:
    """Return the CRF's label map, made at model resolution whatever the size of the mask."""
    size = (row["pixel_height"], row["pixel_width"])
    grid = (row["grid_height"], row["grid_width"])
    products, code = (
        torch.from_numpy(np.frombuffer(row[name], np.float32).reshape(-1, *grid).copy())
        for name in ("products", "norm_code")
    )
    log_probs = upsampled_log_probs(
        products, code, height=size[0], width=size[1], alpha=job.predict.alpha
    )
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(*size, 3)
    labels = refine(pixels, log_probs, job.predict.crf)
    if job.mask_size == "original":
        labels = resize_labels(labels, row["image_height"], row["image_width"])
    return labels

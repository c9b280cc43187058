"""The last stage of bulk segmentation, on CPUs: scores to label maps, rows and files.

Without a CRF it needs no torch, which would take a second and hundreds of megabytes of every
process that writes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from stego_core.config.schema import SegmentJob
from stego_core.distributed.units import receipt_table
from stego_core.errors import ImageProblem
from stego_core.images.geometry import resize_labels
from stego_core.inference.upsample import upsampled_argmax
from stego_core.masks.table import SCHEMA, Segmentation, segmented_row, to_parquet
from stego_core.storage import fs

# What a row has whatever became of its image.
_ALWAYS = SCHEMA.names[:6]


def unit_uri(folder: str, unit: int) -> str:
    """Return where a unit's rows lie until their shard is complete."""
    return fs.join(folder, f"unit-{unit:08d}.parquet")


def finish_unit(unit: int, table: pa.Table, *, folder: str, job: SegmentJob) -> pa.Table:
    """Upsample, refine, encode and write the rows of a unit; return its receipt.

    The unit's file is written in one piece, always with the same bytes: doing it twice does no
    harm.
    """
    rows = masks_rows(unit, table, folder=folder, job=job)
    fs.write_bytes(unit_uri(folder, unit), to_parquet(pa.Table.from_pylist(rows, SCHEMA), {}))
    return receipt_table(unit=unit, statuses=Counter(row["status"] for row in rows))


def masks_rows(unit: int, table: pa.Table, *, folder: str, job: SegmentJob) -> list[dict[str, Any]]:
    """Return the rows that `finish_unit`, called with the same arguments, writes."""
    return [_masks_row(row, job) for row in table.to_pylist()]


def _masks_row(row: dict[str, Any], job: SegmentJob) -> dict[str, Any]:
    if row["status"] != ImageProblem.OK:
        return {name: row.get(name) if name in _ALWAYS else None for name in SCHEMA.names}
    grid = (row["grid_height"], row["grid_width"])
    labels = _refined(row, job) if job.crf else _labels(row, job)
    segmentation = Segmentation(
        labels=labels,
        confidence=np.frombuffer(row["confidence"], np.float32).reshape(grid),
        entropy=row["entropy"],
    )
    known = {name: row.get(name) for name in SCHEMA.names}
    return known | segmented_row(segmentation)


def _scores(row: dict[str, Any], name: str = "products") -> np.ndarray:
    grid = (row["grid_height"], row["grid_width"])
    return np.frombuffer(row[name], np.float32).reshape(-1, *grid)


def _labels(row: dict[str, Any], job: SegmentJob) -> np.ndarray:
    kind = "pixel" if job.mask_size == "model" else "image"
    return upsampled_argmax(_scores(row), row[f"{kind}_height"], row[f"{kind}_width"])


def _refined(row: dict[str, Any], job: SegmentJob) -> np.ndarray:
    """Return the CRF's label map, made at model resolution whatever the size of the mask."""
    size = (row["pixel_height"], row["pixel_width"])
    if row["refined"] is None:
        labels = _refine(row, size, job)
    else:
        kind = np.uint8 if row["refined_bits"] == 8 else np.uint16
        labels = np.frombuffer(row["refined"], kind).reshape(size)
    if job.mask_size == "original":
        labels = resize_labels(labels, row["image_height"], row["image_width"])
    return labels


def _refine(row: dict[str, Any], size: tuple[int, int], job: SegmentJob) -> np.ndarray:
    import torch

    from stego_core.inference.crf import refine, upsampled_log_probs

    products, code = (
        torch.from_numpy(_scores(row, name).copy()) for name in ("products", "norm_code")
    )
    log_probs = upsampled_log_probs(
        products, code, height=size[0], width=size[1], alpha=job.predict.alpha
    )
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(*size, 3)
    return refine(pixels, log_probs, job.predict.crf)

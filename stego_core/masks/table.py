"""The masks table: one row per input image, plain Arrow types only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stego_core.errors import ImageProblem
from stego_core.images.decode import NO_MEMORY
from stego_core.masks.codec import encode_mask
from stego_core.storage.parquet import table_bytes

VERSION = "masks/1"
# Of the store, or of a machine that was short of memory or stood still: it may go well elsewhere.
_PASSING = pa.array(
    [
        ImageProblem.VANISHED,
        ImageProblem.READ_DENIED,
        ImageProblem.READ_FAILED,
        ImageProblem.CRASHED,
        ImageProblem.TIMED_OUT,
    ]
)
_CLUSTER = pa.struct(
    [
        ("cluster", pa.uint16()),
        ("pixels", pa.int32()),
        ("share", pa.float32()),
        ("confidence", pa.float32()),
    ]
)
SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("image_uri", pa.string()),
        ("image_bytes", pa.int64()),
        ("image_etag", pa.string()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("image_height", pa.int32()),
        ("image_width", pa.int32()),
        ("mask", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("mask_height", pa.int32()),
        ("mask_width", pa.int32()),
        ("clusters", pa.list_(_CLUSTER)),
        ("mean_confidence", pa.float32()),
        ("entropy", pa.float32()),
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("image_uri", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Segmentation:
    """The result for one image.

    Attributes:
        labels: (H, W) uint8 or uint16 cluster ids.
        confidence: (h, w) float32 in [0, 1] on the token grid: probability of the best cluster.
        entropy: mean entropy of the cluster probabilities, in nats.
    """

    labels: np.ndarray
    confidence: np.ndarray
    entropy: float


def segmented_row(segmentation: Segmentation) -> dict[str, Any]:
    """Return the columns that describe a segmented image."""
    labels = segmentation.labels
    height, width = labels.shape
    grid_h, grid_w = segmentation.confidence.shape
    # The cell under a pixel's centre.
    rows = (2 * np.arange(height) + 1) * grid_h // (2 * height)
    columns = (2 * np.arange(width) + 1) * grid_w // (2 * width)
    confidence = segmentation.confidence[rows[:, None], columns[None, :]]
    ids = labels.ravel().astype(np.int64)
    pixels = np.bincount(ids)
    sums = np.bincount(ids, weights=confidence.ravel())
    clusters = [
        {
            "cluster": int(cluster),
            "pixels": int(pixels[cluster]),
            "share": float(pixels[cluster] / ids.size),
            "confidence": float(sums[cluster] / pixels[cluster]),
        }
        for cluster in np.flatnonzero(pixels)
    ]
    return {
        "status": ImageProblem.OK.value,
        "detail": None,
        "mask": {"bytes": encode_mask(labels), "path": None},
        "mask_height": height,
        "mask_width": width,
        "clusters": clusters,
        "mean_confidence": float(confidence.mean()),
        "entropy": segmentation.entropy,
    }


def mask_metadata(fingerprint: str, names: list[str], colors: list[str]) -> dict[str, str]:
    """Return the file metadata: versions, cluster names and colours, and how HF reads the file."""
    return {
        "stego.schema": VERSION,
        "stego.fingerprint": fingerprint,
        "stego.clusters": json.dumps(
            [{"name": n, "color": c} for n, c in zip(names, colors, strict=True)]
        ),
        "huggingface": json.dumps({"info": {"features": _hf_features()}}),
    }


def _hf_features() -> dict[str, Any]:
    def value(kind: pa.DataType) -> Any:
        if pa.types.is_list(kind):
            return {"feature": value(kind.value_type), "_type": "List"}
        if pa.types.is_struct(kind):
            return {field.name: value(field.type) for field in kind}
        return {"dtype": "float32" if kind == pa.float32() else str(kind), "_type": "Value"}

    features = {field.name: value(field.type) for field in SCHEMA}
    return features | {"mask": {"_type": "Image"}}


def to_parquet(table: pa.Table, metadata: dict[str, str]) -> bytes:
    """Return a table as the bytes of a Parquet file.

    PNG bytes do not compress and have no useful statistics or dictionary; all else is zstd.
    """
    plain = [name for name in table.schema.names if name != "mask"]
    return table_bytes(
        table.replace_schema_metadata(metadata),
        compression={"mask.bytes": "none", "mask.path": "zstd"} | _leaf_codecs(plain),
        use_dictionary=["status", "detail"],
        write_statistics=["image_id", "image_uri", "status", "mean_confidence", "entropy"],
        row_group_size=2048,
    )


def _leaf_codecs(names: list[str]) -> dict[str, str]:
    leaves = [f"clusters.list.element.{field.name}" for field in _CLUSTER]
    return dict.fromkeys([*(n for n in names if n != "clusters"), *leaves], "zstd")


def may_pass(table: pa.Table) -> pa.ChunkedArray:
    """Return which rows failed for a reason that may pass: with more memory, or in an hour.

    Args:
        table: `status` and `detail`.
    """
    is_short = pc.fill_null(pc.starts_with(table["detail"], NO_MEMORY), fill_value=False)
    return pc.or_(pc.is_in(table["status"], _PASSING), is_short)


def quarantine_table(masks: pa.Table, *, stage: str) -> pa.Table:
    """Return the rows that are not `ok` as a quarantine table."""
    failed = masks.filter(pc.not_equal(masks["status"], ImageProblem.OK))
    return pa.table(
        {
            "image_id": failed["image_id"],
            "image_uri": failed["image_uri"],
            "stage": pa.array([stage] * failed.num_rows, pa.string()),
            "reason": failed["status"],
            "detail": failed["detail"],
        },
        schema=QUARANTINE_SCHEMA,
    )

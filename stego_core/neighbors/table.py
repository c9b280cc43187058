"""The neighbours table: one row per view, the nearest views of other images, nearest first."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa

from stego_core.errors import SchemaError
from stego_core.neighbors.search import NONE
from stego_core.storage import fs
from stego_core.storage.feature_store import Views
from stego_core.storage.parquet import plain_table, table_bytes

_MAX_CROPS = 128
_NEIGHBOR_COLUMNS = ("neighbor_ids", "neighbor_crops")
_PART = re.compile(r"part-\d+\.parquet")

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("crop", pa.int8()),
        ("neighbor_ids", pa.list_(pa.int64())),
        ("neighbor_crops", pa.list_(pa.int8())),
        ("scores", pa.list_(pa.float32())),
    ]
)


def write_part(
    uri: str,
    views: Views,
    rows: slice,
    scores: np.ndarray,
    indices: np.ndarray,
    *,
    key: str,
) -> None:
    """Write the neighbours of a run of views as one Parquet file.

    Args:
        uri: target file.
        views: all views; `indices` point into them.
        rows: the views that this part describes.
        scores: (Q, k) cosine similarities, falling.
        indices: (Q, k) views, `NONE` where there is no neighbour.
        key: fingerprint of what the neighbours were computed from, kept in the file.
    """
    present = indices != NONE
    offsets = np.concatenate([[0], np.cumsum(present.sum(1))]).astype(np.int32)
    neighbors = indices[present]
    table = pa.table(
        {
            "image_id": views.image_ids[rows],
            "crop": views.crops[rows],
            "neighbor_ids": pa.ListArray.from_arrays(offsets, views.image_ids[neighbors]),
            "neighbor_crops": pa.ListArray.from_arrays(offsets, views.crops[neighbors]),
            "scores": pa.ListArray.from_arrays(offsets, scores[present].astype(np.float32)),
        },
        schema=SCHEMA,
    ).replace_schema_metadata({"stego.key": key, "stego.schema": "neighbors/1"})
    fs.write_bytes(uri, table_bytes(table))


def is_part(name: str) -> bool:
    """Tell whether a file in the folder of a neighbours table belongs to the table."""
    return bool(_PART.fullmatch(name))


def read_table(folder_uri: str, *, key: str) -> pa.Table:
    """Return the whole neighbours table.

    Raises:
        SchemaError: if a file was computed from other data or settings than `key` names.
    """
    tables = []
    for name in fs.list_names(folder_uri):
        if not is_part(name):
            continue
        uri = fs.join(folder_uri, name)
        table = plain_table(fs.read_bytes(uri), name=uri)
        if (table.schema.metadata or {}).get(b"stego.key") != key.encode():
            raise SchemaError(f"{uri} is stale; run mine_neighbors again")
        tables.append(table)
    if not tables:
        raise SchemaError(f"{folder_uri} holds no neighbours; run mine_neighbors first")
    return pa.concat_tables(tables)


def neighbor_indices(table: pa.Table, views: Views, used: int) -> np.ndarray:
    """Return the nearest `used` neighbours of each view as indices of views.

    Returns:
        (V, used) int64, `NONE` where a view has fewer.

    Raises:
        SchemaError: if the table is not that of these views.
    """
    index = _ViewIndex(views)
    if table.num_rows != len(views.image_ids):
        raise SchemaError("the neighbours are of other views; run mine_neighbors again")
    out = np.full((len(views.image_ids), used), NONE, np.int64)
    # Never as Python's objects: of ten million views they would take 20 GB.
    for batch in table.to_batches():
        rows = index.find(batch["image_id"].to_numpy(), batch["crop"].to_numpy())
        counts = batch["neighbor_ids"].value_lengths().to_numpy()
        ranks = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        is_used = ranks < used
        nearest = index.find(
            *(batch[name].flatten().to_numpy()[is_used] for name in _NEIGHBOR_COLUMNS)
        )
        out[np.repeat(rows, counts)[is_used], ranks[is_used]] = nearest
    return out


class _ViewIndex:
    """From image id and crop to the view."""

    def __init__(self, views: Views) -> None:
        self._ids = np.unique(views.image_ids)
        codes = self._codes(views.image_ids, views.crops)
        self._order = np.argsort(codes)
        self._codes_sorted = codes[self._order]

    def find(self, image_ids: np.ndarray, crops: np.ndarray) -> np.ndarray:
        """Return the views of pairs of these."""
        codes = self._codes(image_ids, crops)
        views: np.ndarray = self._order[_places(self._codes_sorted, codes)]
        return views

    def _codes(self, image_ids: np.ndarray, crops: np.ndarray) -> np.ndarray:
        # An id has 63 bits and leaves no room for a crop: its rank does.
        codes: np.ndarray = _places(self._ids, image_ids) * _MAX_CROPS + crops
        return codes


def _places(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return where sorted values are that must be there."""
    places = np.searchsorted(known, wanted)
    if len(wanted) and (places.max() == len(known) or (known[places] != wanted).any()):
        raise SchemaError("the neighbours are of other views; run mine_neighbors again")
    return places

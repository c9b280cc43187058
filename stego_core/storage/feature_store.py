"""The feature store: the backbone's patch features of every training view, computed once.

One work unit of the manifest is one pair of files: `unit-<n>.npy`, (V, h, w, C) float16, and
`unit-<n>.parquet` with one row per view (and per image that could not be used). The table is
written last, so a unit is complete exactly when its table is there.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stego_core.errors import ImageProblem
from stego_core.storage import fs
from stego_core.storage.parquet import plain_table, table_bytes

_HEADER_BYTES = 256  # of a .npy file: our own headers take 128
_READERS = 16

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("crop", pa.int8()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("embedding", pa.list_(pa.float32())),
        ("class_token", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, slots=True)
class Views:
    """All views of a store, in manifest order; row v of each array is view v.

    Attributes:
        image_ids: (V,) int64.
        crops: (V,) int8, 0 for a whole image, 0 to 4 for five crops.
        embeddings: (V, D) float32, unit length: mean of the patch features.
        failures: (image_id, problem, detail) of images that could not be used.
        class_tokens: (V, C) float32, or None where the backbone has no class token.
    """

    image_ids: np.ndarray
    crops: np.ndarray
    embeddings: np.ndarray
    failures: list[tuple[int, str, str]]
    class_tokens: np.ndarray | None = None


def unit_names(folder_uri: str) -> set[int]:
    """Return the numbers of the units that are complete."""
    names = fs.list_names(folder_uri)
    return {
        int(name[5:13]) for name in names if name.startswith("unit-") and name.endswith(".parquet")
    }


def write_unit(folder_uri: str, unit: int, table: pa.Table, features: np.ndarray | None) -> None:
    """Write one unit: features (V, h, w, C), if they are stored, then the table of its views."""
    array_uri = fs.join(folder_uri, f"unit-{unit:08d}.npy")
    if features is None:
        fs.delete(array_uri)  # of a job that died before its table, and found images usable
    else:
        buffer = io.BytesIO()
        np.save(buffer, features.astype(np.float16), allow_pickle=False)
        fs.write_bytes(array_uri, buffer.getvalue())
    uri = fs.join(folder_uri, f"unit-{unit:08d}.parquet")
    # Numbers that never repeat: a dictionary of them would be half as large again as they are.
    fs.write_bytes(uri, table_bytes(table.cast(SCHEMA), use_dictionary=["status", "detail"]))


def drop_units(
    folder_uri: str, num_units: int, is_dropped: Callable[[pa.Table], bool]
) -> list[int]:
    """Make the units pending again whose tables are chosen; return their numbers.

    Args:
        folder_uri: of the store.
        num_units: of the manifest; units that are not there are passed over.
        is_dropped: `status` and `detail` of a unit's rows → whether it goes.
    """
    dropped = []
    for unit in sorted(unit_names(folder_uri) & {*range(num_units)}):
        uri = fs.join(folder_uri, f"unit-{unit:08d}.parquet")
        if is_dropped(fs.read_table(uri, ["status", "detail"])):
            fs.delete(uri)
            dropped.append(unit)
    return dropped


def read_views(folder_uri: str, num_units: int) -> Views:
    """Return every usable view of a complete store, which may be none."""
    uris = [fs.join(folder_uri, f"unit-{unit:08d}.parquet") for unit in range(num_units)]
    with ThreadPoolExecutor(_READERS) as pool:  # a request each where the store is remote
        tables = list(pool.map(lambda uri: plain_table(fs.read_bytes(uri), name=uri), uris))
    table = pa.concat_tables(tables)
    usable = table.filter(pc.equal(table["status"], ImageProblem.OK))
    failed = table.filter(pc.not_equal(table["status"], ImageProblem.OK))
    has_tokens = usable.num_rows > 0 and not usable["class_token"].null_count
    return Views(
        image_ids=usable["image_id"].to_numpy(),
        crops=usable["crop"].to_numpy(),
        embeddings=_matrix(usable, "embedding"),
        class_tokens=_matrix(usable, "class_token") if has_tokens else None,
        failures=[(r["image_id"], r["status"], r["detail"]) for r in failed.to_pylist()],
    )


def _matrix(table: pa.Table, name: str) -> np.ndarray:
    if not table.num_rows:
        return np.empty((0, 0))
    # Not joined by Arrow: its lists can't have more than 2^31 numbers together.
    return np.concatenate([chunk.flatten().to_numpy() for chunk in table[name].chunks]).reshape(
        table.num_rows, -1
    )


class StoredFeatures:
    """Random access to the features of a complete store.

    Opening reads the header of each file only. A unit is memory-mapped when one of its views is
    first read, so a worker maps what it samples; a unit of a store in a bucket is copied to a
    temporary folder then.

    Args:
        folder_uri: the store.
        num_units: units of the manifest it was made from.
    """

    def __init__(self, folder_uri: str, num_units: int) -> None:
        self._folder_uri = folder_uri
        self._copies = None if fs.is_local(folder_uri) else tempfile.TemporaryDirectory()
        self._maps: dict[int, np.ndarray] = {}
        with ThreadPoolExecutor(_READERS) as pool:  # a request each where the store is remote
            shapes = list(pool.map(self._unit_shape, range(num_units)))
        self._ends = np.cumsum([0 if shape is None else shape[0] for shape in shapes])
        (self._shape,) = {shape[1:] for shape in shapes if shape is not None}

    def _uri(self, unit: int) -> str:
        return fs.join(self._folder_uri, f"unit-{unit:08d}.npy")

    def _unit_shape(self, unit: int) -> tuple[int, ...] | None:
        try:
            return _array_shape(fs.read_bytes(self._uri(unit), _HEADER_BYTES))
        except FileNotFoundError:
            return None  # a unit in which no image was usable has no features

    def _unit(self, unit: int) -> np.ndarray:
        if unit not in self._maps:
            if self._copies is None:
                path = fs.local_path(self._uri(unit))
            else:
                path = Path(self._copies.name, f"{unit}.npy")
                path.write_bytes(fs.read_bytes(self._uri(unit)))
            self._maps[unit] = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._maps[unit]

    def __len__(self) -> int:
        """Return the number of views."""
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (h, w, C) of each view."""
        return self._shape

    @property
    def mapped(self) -> list[int]:
        """Return the units that are mapped so far."""
        return sorted(self._maps)

    def read(self, views: np.ndarray) -> np.ndarray:
        """Return the features of some views: (B, h, w, C) float32."""
        out = np.empty((len(views), *self._shape), np.float32)
        units = np.searchsorted(self._ends, views, side="right")
        for row, (view, unit) in enumerate(zip(views, units, strict=True)):
            array = self._unit(int(unit))
            out[row] = array[view - (self._ends[unit] - len(array))]
        return out


def _array_shape(start: bytes) -> tuple[int, ...]:
    """Return the shape that the header of a `.npy` file states."""
    stream = io.BytesIO(start)
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    shape: tuple[int, ...] = read(stream)[0]
    return shape

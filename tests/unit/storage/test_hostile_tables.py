"""Tables of strangers never make Arrow or Ray load a type of their own.

Ray's extension types carried a pickle in a field's metadata (CVE-2026-41486), and so did pyarrow's
own (CVE-2023-47248). Each table here would make a folder when such a pickle runs.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from stego_core.config.schema import ReportJob
from stego_core.errors import SchemaError
from stego_core.neighbors.table import SCHEMA as NEIGHBORS
from stego_core.neighbors.table import read_table
from stego_core.storage.feature_store import read_views
from stego_core.storage.manifest import SCHEMA as MANIFEST
from stego_core.storage.manifest import read_manifest
from stego_core.storage.parquet import plain_table, refuse_extensions
from stego_core.viz.build import _failures, _images, _quarantine

NAMES = [
    "arrow.py_extension_type",
    "ray.data.arrow_tensor",
    "ray.data.arrow_tensor_v2",
    "ray.data.arrow_variable_shaped_tensor",
    "ray.data.arrow_pickled_object",
]


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module", autouse=True)
def _ray_data():
    import ray.data  # noqa: F401 - registers its extension types, as in any worker


def hostile(schema: pa.Schema, marker: Path, name: str, metadata: dict[str, str]) -> pa.Table:
    """An empty table whose every column says that it is of a type with a pickle in it."""
    told = {
        b"ARROW:extension:name": name.encode(),
        b"ARROW:extension:metadata": pickle.dumps(Bomb(marker)),
    }
    fields = [pa.field(f.name, f.type, metadata=told) for f in schema]
    return pa.schema(fields, metadata=metadata).empty_table()


def test_the_bomb_goes_off_when_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("name", NAMES)
def test_no_reader_of_tables_runs_what_is_in_their_metadata(name, tmp_path):
    marker = tmp_path / "marker"
    folder = tmp_path / "tables"
    folder.mkdir()
    pq.write_table(
        hostile(NEIGHBORS, marker, name, {"stego.key": "k"}), folder / "part-00000.parquet"
    )
    pq.write_table(
        hostile(MANIFEST, marker, name, {"stego.digest": "d"}), tmp_path / "manifest.parquet"
    )
    unit = pa.schema(
        [("image_id", pa.int64()), ("status", pa.string()), ("embedding", pa.list_(pa.float32()))]
    )
    pq.write_table(hostile(unit, marker, name, {}), tmp_path / "unit-00000000.parquet")
    masks = pa.schema([("image_uri", pa.string()), ("status", pa.string())])
    pq.write_table(hostile(masks, marker, name, {}), tmp_path / "masks.parquet")
    reads = [
        lambda: read_table(str(folder), key="k"),
        lambda: read_manifest(str(tmp_path / "manifest.parquet")).read(),
        lambda: read_views(str(tmp_path), 1),
        lambda: list(_images([str(tmp_path / "masks.parquet")], ReportJob(), {})),
    ]
    for read in reads:
        with pytest.raises(SchemaError, match="extension types") as caught:
            read()
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert not marker.exists()


def test_the_quarantine_of_a_stranger_is_refused_too(tmp_path):
    from stego_core.storage.run import RunDirectory

    schema = pa.schema([(n, pa.string()) for n in ("image_uri", "reason", "detail")])
    table = hostile(schema, tmp_path / "marker", NAMES[0], {})
    pq.write_table(table, tmp_path / "quarantine.parquet")
    with pytest.raises(SchemaError, match="extension types"):
        _quarantine(RunDirectory(str(tmp_path), job="x"))
    assert not (tmp_path / "marker").exists()


def test_the_scores_of_a_stranger_are_refused_too(tmp_path):
    (tmp_path / "metrics").mkdir()
    schema = pa.schema([("image_uri", pa.string()), ("accuracy", pa.float64())])
    table = hostile(schema, tmp_path / "marker", NAMES[0], {})
    pq.write_table(table, tmp_path / "metrics" / "images.parquet")
    with pytest.raises(SchemaError, match="extension types"):
        _failures(ReportJob(metrics=str(tmp_path)))
    assert not (tmp_path / "marker").exists()


def plain(tmp_path):
    data = pa.BufferOutputStream()
    table = pa.table({"a": [1, 2]}).replace_schema_metadata({"ARROW:note": "x" * 300})
    pq.write_table(table, data)
    return table, data.getvalue().to_pybytes()


def test_plain_tables_of_any_metadata_are_read(tmp_path):
    table, data = plain(tmp_path)
    assert plain_table(data) == table
    path = tmp_path / "t.parquet"
    path.write_bytes(data)
    refuse_extensions(str(path), pa.fs.LocalFileSystem())


def test_a_description_in_another_order_is_refused_rather_than_passed_over(tmp_path):
    _, data = plain(tmp_path)
    assert data.count(b"ARROW:schema") == 1
    with pytest.raises(SchemaError, match="damaged"):
        plain_table(data.replace(b"ARROW:schema\x18", b"ARROW:schema\x28"))


@pytest.mark.parametrize("data", [b"", b"PAR1", b"x" * 100, b"PAR1" + b"\xff" * 4 + b"PAR1"])
def test_what_is_no_parquet_is_left_to_arrow(data):
    with pytest.raises(pa.ArrowInvalid):
        plain_table(data)


def test_a_real_table_of_rays_tensors_is_refused(tmp_path):
    import numpy as np
    from ray.data.extensions import ArrowTensorArray

    tensors = ArrowTensorArray.from_numpy(np.zeros((3, 2, 2)))
    path = tmp_path / "tensors.parquet"
    pq.write_table(pa.table({"x": tensors}), path)
    with pytest.raises(SchemaError, match="extension types"):
        plain_table(path.read_bytes())

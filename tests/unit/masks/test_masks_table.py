from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from plain_readers import READERS

from stego_core.errors import ImageProblem
from stego_core.masks.codec import decode_mask
from stego_core.masks.table import (
    QUARANTINE_SCHEMA,
    SCHEMA,
    VERSION,
    Segmentation,
    mask_metadata,
    quarantine_table,
    segmented_row,
    to_parquet,
)

LABELS = [np.arange(12, dtype=np.uint8).reshape(3, 4) % 5, np.full((2, 6), 300, np.uint16)]
METADATA = mask_metadata("abc", ["sky", "tree"], ["#748cf8", "#f8ec38"])


def image(number, row):
    common = {
        "image_id": number,
        "image_uri": f"s3://bucket/{number}.jpg",
        "image_bytes": 100 + number,
        "image_etag": "e",
        "image_height": 30,
        "image_width": 40,
    }
    return dict.fromkeys(SCHEMA.names) | common | row


def failed(number, problem, detail):
    size = {"image_height": None, "image_width": None}
    return image(number, {"status": problem.value, "detail": detail, **size})


def masks_table():
    confidence = np.linspace(0.2, 0.9, 4, dtype=np.float32).reshape(2, 2)
    rows = [image(n, segmented_row(Segmentation(m, confidence, 1.5))) for n, m in enumerate(LABELS)]
    rows += [
        failed(7, ImageProblem.TRUNCATED, "unexpected end"),
        failed(8, ImageProblem.TOO_SMALL, "1 x 1"),
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("masks") / "part-00000.parquet"
    path.write_bytes(to_parquet(masks_table(), METADATA))
    return path


def test_a_row_counts_the_pixels_and_averages_the_confidence_of_each_cluster():
    labels = np.array([[2, 2, 0, 0], [2, 2, 0, 2]], np.uint8)
    confidence = np.array([[0.25, 0.75]], np.float32)  # of the left and the right half
    row = segmented_row(Segmentation(labels, confidence, 1.25))
    assert row["status"] == "ok"
    assert row["clusters"] == [
        {"cluster": 0, "pixels": 3, "share": 0.375, "confidence": 0.75},
        {"cluster": 2, "pixels": 5, "share": 0.625, "confidence": pytest.approx(0.35)},
    ]
    assert row["mean_confidence"] == 0.5
    assert row["entropy"] == 1.25
    np.testing.assert_array_equal(decode_mask(row["mask"]["bytes"]), labels)


def test_a_pixels_confidence_is_that_of_the_cell_under_its_centre():
    labels = np.array([[0, 1]], np.uint8)  # fewer pixels than cells
    row = segmented_row(Segmentation(labels, np.array([[0.1, 0.2, 0.3, 0.4]], np.float32), 1.0))
    assert [one["confidence"] for one in row["clusters"]] == pytest.approx([0.2, 0.4])


def test_what_is_read_is_what_was_written(path):
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    assert table.equals(masks_table().replace_schema_metadata(table.schema.metadata))


def test_the_same_table_gives_the_same_bytes():
    assert to_parquet(masks_table(), METADATA) == to_parquet(masks_table(), METADATA)


def test_only_plain_arrow_types_are_in_the_file(path):
    def leaves(kind):
        if pa.types.is_struct(kind):
            return [leaf for field in kind for leaf in leaves(field.type)]
        return leaves(kind.value_type) if pa.types.is_list(kind) else [kind]

    kinds = [leaf for field in pq.read_schema(path) for leaf in leaves(field.type)]
    assert not any(isinstance(kind, pa.BaseExtensionType) for kind in kinds)
    assert {str(k) for k in kinds} <= {"int64", "int32", "uint16", "float", "string", "binary"}


def test_png_bytes_are_stored_as_they_are_and_all_else_is_compressed(path):
    group = pq.ParquetFile(path).metadata.row_group(0)
    codecs = {}
    for index in range(group.num_columns):
        codecs[group.column(index).path_in_schema] = group.column(index).compression
    assert codecs.pop("mask.bytes") == "UNCOMPRESSED"
    assert set(codecs.values()) == {"ZSTD"}
    assert len(codecs) == len(SCHEMA) - 2 + 1 + 4


def test_statistics_are_there_to_skip_by_id_and_status_but_not_for_png_bytes(path):
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = {}
    for index in range(group.num_columns):
        columns[group.column(index).path_in_schema] = group.column(index)
    assert columns["image_id"].statistics.max == 8
    assert columns["status"].is_stats_set
    assert not columns["mask.bytes"].is_stats_set


def test_the_metadata_tells_version_clusters_and_how_to_load_every_column(path):
    found = {k.decode(): v.decode() for k, v in pq.read_schema(path).metadata.items()}
    assert found["stego.schema"] == VERSION
    assert found["stego.fingerprint"] == "abc"
    assert json.loads(found["stego.clusters"])[1] == {"name": "tree", "color": "#f8ec38"}
    features = json.loads(found["huggingface"])["info"]["features"]
    assert list(features) == SCHEMA.names
    assert features["mask"] == {"_type": "Image"}
    assert features["image_id"] == {"dtype": "int64", "_type": "Value"}
    assert features["entropy"] == {"dtype": "float32", "_type": "Value"}
    assert features["clusters"]["_type"] == "List"
    assert features["clusters"]["feature"]["cluster"] == {"dtype": "uint16", "_type": "Value"}


def test_names_and_colours_must_be_as_many():
    with pytest.raises(ValueError, match="shorter"):
        mask_metadata("f", ["a", "b"], ["#000000"])


@pytest.fixture(scope="module")
def elsewhere(path):
    """What a process reads in which neither Ray nor this package can be imported."""
    script = Path(__file__).parents[2] / "plain_readers.py"
    command = [sys.executable, str(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("reader", READERS)
def test_masks_are_read_where_neither_ray_nor_this_package_can_be_imported(reader, elsewhere):
    if reader not in elsewhere["rows"]:
        pytest.skip(f"{reader} is not installed")
    assert elsewhere["rows"][reader] == [
        ["ok", LABELS[0].tolist(), 12],
        ["ok", LABELS[1].tolist(), 12],
        ["truncated", None, None],
        ["too_small", None, None],
    ]
    assert elsewhere["imported"] == []


def test_pictures_open_with_pillow_alone(path):
    from PIL import Image

    row = pq.read_table(path).to_pylist()[0]
    assert Image.open(io.BytesIO(row["mask"]["bytes"])).size == (4, 3)


def test_the_quarantine_holds_the_rows_that_are_not_ok_with_their_reasons():
    table = quarantine_table(masks_table(), stage="segment")
    assert table.schema.equals(QUARANTINE_SCHEMA)
    expected = [(7, "truncated", "unexpected end"), (8, "too_small", "1 x 1")]
    rows = table.to_pylist()
    assert [(r["image_id"], r["reason"], r["detail"]) for r in rows] == expected
    assert {r["stage"] for r in rows} == {"segment"}
    assert rows[0]["image_uri"] == "s3://bucket/7.jpg"


def test_the_quarantine_of_a_clean_table_is_empty():
    table = quarantine_table(masks_table().slice(0, 2), stage="segment")
    assert table.num_rows == 0
    assert table.schema.equals(QUARANTINE_SCHEMA)

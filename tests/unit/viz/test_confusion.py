"""The confusion chart: from the tables of an evaluation to a row for each class."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stego_core.errors import SchemaError
from stego_core.viz.confusion import ConfusionFacts, confusion_svg, read_confusion

HOSTILE = "<script>alert(1)</script>"


def write(
    folder: Path, cells: list[tuple[int, int, int]], matched: dict[int, int | None], **told: Any
) -> str:
    """Write what `evaluate.py` leaves: cells of [true, cluster, pixels], cluster of each class."""
    (folder / "metrics").mkdir(parents=True)
    columns = dict(
        zip(("true_class", "predicted", "pixels"), zip(*cells, strict=True), strict=True)
    )
    pq.write_table(pa.table(columns), folder / "metrics" / "confusion-cluster.parquet")
    row = {"split": "val", "head": "cluster", "matching": "hungarian", "crf": False, "flip": False}
    head = {"metric": "miou", "class_id": None, "cluster_id": None, "value": 20.0}
    rows: list[dict[str, Any]] = [row | head]
    rows += [
        row | {"metric": "iou", "class_id": one, "cluster_id": cluster, "value": 10.0 + one}
        for one, cluster in matched.items()
    ]
    rows += [row | {"head": "linear", "metric": "iou", "class_id": one} for one in matched]
    pq.write_table(pa.Table.from_pylist(rows), folder / "metrics" / "metrics.parquet")
    protocol = {"classes": sorted(matched)} | told
    (folder / "protocol.json").write_text(json.dumps(protocol))
    return str(folder)


def test_rows_are_shares_in_the_clusters_of_the_classes_and_in_those_of_none(tmp_path: Path):
    cells = [(1, 4, 6), (1, 0, 2), (1, 2, 2), (3, 0, 5), (5, 4, 1)]
    uri = write(tmp_path, cells, {1: 4, 3: 0, 5: None}, class_names=["a", "b", "c"])
    facts = read_confusion(uri)
    assert facts is not None
    assert facts.classes == ["a", "b", "c"]
    assert facts.iou == [11.0, 13.0, 15.0]
    expected = [[0.6, 0.2, 0, 0.2], [0, 1, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_allclose(facts.shares, expected)


def test_classes_without_names_are_numbers_and_an_evaluation_of_before_is_none(tmp_path: Path):
    facts = read_confusion(write(tmp_path / "a", [(7, 0, 1)], {7: 0}))
    assert facts is not None
    assert facts.classes == ["7"]
    assert read_confusion(str(tmp_path / "nowhere")) is None
    cells = [(one, 0, 1) for one in range(61)]
    assert read_confusion(write(tmp_path / "b", cells, dict.fromkeys(range(61)))) is None


def test_tables_that_do_not_fit_are_one_line(tmp_path: Path):
    uri = write(tmp_path, [(2, 0, 1)], {1: 0})
    with pytest.raises(SchemaError, match="do not fit together") as caught:
        read_confusion(uri)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_parquet_is_one_line(tmp_path: Path):
    uri = write(tmp_path, [(1, 0, 1)], {1: 0})
    (tmp_path / "metrics" / "metrics.parquet").write_bytes(b"no")
    with pytest.raises(SchemaError, match="no Parquet") as caught:
        read_confusion(uri)
    assert "\n" not in str(caught.value)


def test_the_chart_is_well_formed_and_names_are_text():
    shares = np.array([[0.9, 0.02, 0.08], [0.0, 0.0, 1.0]])
    chart = confusion_svg(ConfusionFacts(["sky", HOSTILE], [81.25, math.nan], shares))
    root = ElementTree.fromstring(chart)
    words = ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("sky") == 2
    assert [word for word in words if word.startswith("<script>")]
    assert HOSTILE not in chart
    assert {"90", "8", "100", "81.2", "–", "no class", "IoU"} <= set(words)
    assert "2" not in words  # less than one in twenty
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + 2 * 3

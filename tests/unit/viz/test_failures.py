"""Failures of an evaluation as the report takes them: names, order, and damaged tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stego_core.config.schema import ReportJob
from stego_core.errors import SchemaError
from stego_core.viz.build import _failures

ROW: dict[str, Any] = {"image_uri": "a.jpg", "pixels": 200, "accuracy": 12.5, "true_class": 3}
ROW |= {"predicted": 4, "predicted_class": 5, "wrong_pixels": 50}


def job(folder: Path, *rows: dict[str, Any], **told: Any) -> ReportJob:
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "metrics" / "images.parquet")
    (folder / "protocol.json").write_text(json.dumps(told))
    return ReportJob(metrics=str(folder))


def test_failures_say_which_class_was_taken_for_which(tmp_path: Path):
    other = ROW | {"image_uri": "b.jpg", "predicted_class": None}
    right = ROW | {"image_uri": "c.jpg", "accuracy": 100.0, "wrong_pixels": None}
    names = {"classes": [3, 5], "class_names": ["cow", "sheep"]}
    found = _failures(job(tmp_path, ROW, other, right, **names))
    assert {uri: one.error for uri, one in found.items()} == {
        "a.jpg": "cow as sheep (cluster 4), 25.0 %",
        "b.jpg": "cow as cluster 4, which has no class, 25.0 %",
    }
    assert found["a.jpg"].accuracy == 12.5
    plain = _failures(job(tmp_path, ROW))
    assert plain["a.jpg"].error == "class 3 as class 5 (cluster 4), 25.0 %"


def test_at_most_24_are_shown_and_none_without_an_evaluation(tmp_path: Path):
    rows = [ROW | {"image_uri": f"{number}.jpg"} for number in range(40)]
    assert list(_failures(job(tmp_path, *rows))) == [f"{number}.jpg" for number in range(24)]
    assert _failures(ReportJob()) == _failures(ReportJob(metrics=str(tmp_path / "no"))) == {}


@pytest.mark.parametrize(
    "damage", [{"accuracy": None}, {"pixels": 0}, {"wrong_pixels": "many"}, {"pixels": None}]
)
def test_a_damaged_table_is_one_line(damage: dict[str, Any], tmp_path: Path):
    with pytest.raises(SchemaError, match="no table of image scores") as caught:
        _failures(job(tmp_path, ROW | damage))
    assert "\n" not in str(caught.value)

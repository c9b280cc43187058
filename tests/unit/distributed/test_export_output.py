"""What an export may delete: its own files, and no labels that a person drew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from factories import picture, png_bytes, write_tree

from stego_core.config.export import ExportJob
from stego_core.distributed.export import _refuse_others, export_part
from stego_core.errors import CheckpointError
from stego_core.masks.classes import name_classes
from stego_core.masks.codec import encode_mask
from stego_core.masks.table import SCHEMA, to_parquet
from stego_core.storage import fs
from stego_core.storage.run import RunDirectory
from stego_core.viz.export import Names


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_output_of_another_job_is_refused(overwrite: bool, tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path), job="export")
    job = ExportJob(masks="masks", out=run.uri, overwrite=overwrite)
    _refuse_others(job, run)
    with pytest.raises(CheckpointError, match="holds the masks"):
        _refuse_others(replace(job, masks=f"{run.uri}/"), run)
    run.write_json("fingerprint.json", {"dataset": "camvid"})
    with pytest.raises(CheckpointError, match="output of another job"):
        _refuse_others(job, run)
    run.write_json("fingerprint.json", {"job": "export"})
    _refuse_others(job, run)


def test_labels_that_nobody_told_the_job_of_are_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, {"labels/train/0.png": b"drawn by hand"})
    with pytest.raises(CheckpointError, match="has labels, but no fingerprint"):
        _refuse_others(ExportJob(out=str(tmp_path)), RunDirectory(str(tmp_path), job="export"))


def part(folder: Path, statuses: dict[str, str]) -> str:
    rows = []
    for number, (name, status) in enumerate(statuses.items()):
        row = dict.fromkeys(SCHEMA.names) | {"image_id": number, "status": status}
        row |= {"image_uri": str(folder / name), "image_height": 8, "image_width": 8}
        if status == "ok":
            row["mask"] = {"bytes": encode_mask(picture(8, 8)[..., 0] % 2), "path": None}
        rows.append(row)
    uri = str(folder / "part-00000.parquet")
    fs.write_bytes(uri, to_parquet(pa.Table.from_pylist(rows, SCHEMA), {}))
    return uri


def test_files_of_images_that_lost_their_mask_go(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a.png": png_bytes(picture()), "b.png": png_bytes(picture())})
    job = ExportJob(masks=str(tmp_path), out=str(tmp_path / "out"))
    shared = (Names(["a.png", "b.png"], [0, 1]), name_classes(["c0", "c1"], {}), f"{tmp_path}/")
    index = str(tmp_path / "out" / "index" / "part-00000.parquet")
    both = part(tmp_path, {"a.png": "ok", "b.png": "ok"})
    assert export_part(job, shared, both, index, "1") == {"images": 2, "labels": 2, "overlays": 0}
    assert sorted(fs.list_names(str(tmp_path / "out" / "labels"))) == ["a.png", "b.png"]
    one = part(tmp_path, {"a.png": "ok", "b.png": "truncated"})
    assert export_part(job, shared, one, index, "2") == {"images": 2, "labels": 1, "overlays": 0}
    assert fs.list_names(str(tmp_path / "out" / "labels")) == ["a.png"]

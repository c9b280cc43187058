"""What a segmentation finds in its output that no job has made stays where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import picture, png_bytes, write_tree

from stego_core.config.schema import SegmentJob
from stego_core.distributed import segment
from stego_core.errors import CheckpointError
from stego_core.storage.run import RunDirectory


@pytest.mark.parametrize("name", ["masks/0.png", "precision.json", "manifest.parquet"])
def test_what_no_output_made_is_not_deleted(name: str, tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"images/0.png": png_bytes(picture()), name: b"drawn by hand"})
    run = RunDirectory(str(root), job="segment")
    with pytest.raises(CheckpointError, match=f"{name.partition('/')[0]}, but no fingerprint"):
        run.refuse_others(segment._RESULTS)
    assert (root / name).read_bytes() == b"drawn by hand"


def test_an_output_and_an_empty_folder_are_taken(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path / "out"), job="segment")
    run.refuse_others(segment._RESULTS)
    run.claim({"seed": 1})
    write_tree(tmp_path / "out", {"masks/part-00000.parquet": b"of an earlier run"})
    run.refuse_others(segment._RESULTS)
    assert (tmp_path / "out" / "masks" / "part-00000.parquet").exists()


def test_an_output_below_its_input_is_no_input(tmp_path: Path) -> None:
    names = ["0.png", "masks.png", "masks/report/images/0.png", "masks-of-1/1.png"]
    root = write_tree(tmp_path, {name: png_bytes(picture()) for name in names})
    for slash in ("", "/"):
        job = SegmentJob(input=f"{root}{slash}", out=str(root / "masks"))
        found = [file.path for file in segment._list_input(job, job.input)]
        assert sorted(found) == ["0.png", "masks-of-1/1.png", "masks.png"]
    assert len(segment._list_input(SegmentJob(out="/elsewhere"), str(root))) == 4


def test_a_slash_at_the_end_is_no_other_input(tmp_path: Path) -> None:
    write_tree(tmp_path, {"model.safetensors": b"x", "model.json": b"{}"})
    records = [
        segment._record(SegmentJob(), str(tmp_path), source=f"s3://bucket/photos{slash}")
        for slash in ("", "/")
    ]
    assert records[0] == records[1]


def test_the_job_asks_before_it_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree(tmp_path, {"images/0.png": png_bytes(picture()), "masks/0.png": b"drawn"})
    monkeypatch.setattr(segment, "find_model", lambda model: model)
    monkeypatch.setattr(segment, "load_tensors", lambda folder, name: None)
    monkeypatch.setattr(segment, "_record", lambda *_, **__: {"seed": 1})
    # Nor does --overwrite take what no job has made.
    job = SegmentJob(input=str(root / "images"), out=str(root), overwrite=True)
    with pytest.raises(CheckpointError, match="or delete it yourself"):
        segment.segment_bucket(job, RunDirectory(str(root), job="segment"))
    assert (root / "masks" / "0.png").read_bytes() == b"drawn"
    assert not (root / "fingerprint.json").exists()

"""The plan of a segmentation: what is left, what has changed, and what a run would refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from factories import picture, png_bytes, write_tree

from stego_core.config.schema import ChaosJob, LabelMapConfig, SegmentJob
from stego_core.distributed import estimate, segment
from stego_core.distributed.chaos_targets import Segmentation
from stego_core.masks.table import SCHEMA, to_parquet
from stego_core.masks.verify import SUCCESS
from stego_core.storage.manifest import list_images, write_manifest
from stego_core.storage.run import RunDirectory


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SegmentJob:
    monkeypatch.setattr(estimate, "seconds_per_view", lambda config, side: side / 2)
    Segmentation(ChaosJob(), RunDirectory(str(tmp_path), job="test"))  # writes the model
    root = write_tree(tmp_path / "in", {f"{n}.png": png_bytes(picture(seed=n)) for n in range(5)})
    return SegmentJob(
        input=str(root),
        model=str(tmp_path / "random-model"),
        out=str(tmp_path / "out"),
        predict=LabelMapConfig(resolution=60, unit_images=2, shard_batches=2),
    )


def work(job: SegmentJob) -> list[str]:
    return segment.plan_segment(job)[3:-1]


def begin(job: SegmentJob) -> RunDirectory:
    """Leave what a run leaves that was killed before its first unit."""
    run = RunDirectory(job.out, job="segment")
    run.claim(segment._record(job, segment.find_model(job.model), source=job.input))
    files = list_images(job.input)
    write_manifest(run.path("manifest.parquet"), files, unit_images=job.predict.unit_images)
    return run


def test_a_new_output_is_planned_with_its_time(job: SegmentJob) -> None:
    # Views of 64 pixels, whole patches, of 32 s each.
    time = "time of the backbone: about {} min on the CPU of this machine"
    assert work(job) == ["work: 3 units in 2 Parquet file(s)", time.format(3)]
    assert work(replace(job, flip=True))[1] == time.format(5)
    twice = replace(job.predict, scales=(1.0, 2.0))
    assert work(replace(job, predict=twice, crf=True))[1] == (
        time.format(13) + "; the CRF comes on top"
    )


def test_the_last_line_says_where_the_crf_computes(job: SegmentJob) -> None:
    last = "crf: {}, flip: off, mask size: model"
    beside = replace(job.predict, crf_device="model")
    assert segment.plan_segment(job)[-1] == last.format("off")
    assert segment.plan_segment(replace(job, crf=True))[-1] == last.format("fast")
    job = replace(job, crf=True, predict=beside)
    assert segment.plan_segment(job)[-1] == last.format("fast on the model's device")


def test_what_is_left_and_what_has_changed_are_told(job: SegmentJob) -> None:
    run = begin(job)
    assert work(job)[0] == "work: 5 of 5 images are left of an earlier run"
    row = dict.fromkeys(SCHEMA.names) | {"image_id": 1, "status": "ok"}
    part = to_parquet(pa.Table.from_pylist([row] * 4, SCHEMA), {})
    write_tree(Path(job.out), {"masks/part-00000.parquet": part, "masks/by-hand.png": b""})
    assert work(job)[0] == "work: 1 of 5 images are left of an earlier run"
    write_tree(Path(job.out), {"_units/key/unit-00000002.parquet": b""})
    write_tree(Path(job.input), {"6.png": b"new", "0.png": b"other bytes"})
    Path(job.input, "1.png").unlink()
    assert work(job)[0] == (
        "work: 0 of 5 images are left of an earlier run; "
        "since its list was written: 1 added, 1 changed, 1 gone"
    )
    run.write_json(SUCCESS, {"rows": 5})
    assert "1 added, 1 changed, 1 gone" in work(job)[0]


def test_a_complete_output_has_nothing_to_do(job: SegmentJob) -> None:
    begin(job).write_json(SUCCESS, {"rows": 5})
    assert work(job) == ["work: nothing to do, the output is complete"]


def test_other_settings_are_refused_in_the_plan_as_by_the_run(job: SegmentJob) -> None:
    begin(job)
    before = sorted(Path(job.out).rglob("*"))
    other = replace(job, flip=True)
    assert work(other) == ["work: refused without --overwrite, other than what is there: flip"]
    anew = work(replace(other, overwrite=True))[0]
    assert anew == "work: 3 units in 2 Parquet file(s), in place of what other settings made"
    assert sorted(Path(job.out).rglob("*")) == before

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from factories import picture, png_bytes, write_tree

from stego_core.config.load import load_job
from stego_core.config.schema import EvaluateJob, MineJob, TrainJob
from stego_core.distributed import estimate
from stego_core.distributed import mine as mine_module
from stego_core.distributed.estimate import lacking_room
from stego_core.distributed.evaluate import plan_evaluate
from stego_core.distributed.mine import find_images, plan_mine
from stego_core.distributed.mine_record import mining_record
from stego_core.errors import ConfigError
from stego_core.storage import fs
from stego_core.storage.lease import hold
from stego_core.storage.manifest import digest_files, list_images
from stego_core.storage.run import RunDirectory

SMALL = ["--backbone.name", "test_vit", "--backbone.weights", "random", "--views.resolution", "64"]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    files = {f"{number}.png": png_bytes(picture(seed=number)) for number in range(5)}
    return ["--data.root", str(write_tree(tmp_path / "data", files)), "--out", str(tmp_path / "o")]


def plan(job_type, flags: list[str]) -> list[str]:
    return plan_mine(load_job(job_type, flags, prog="test"))


def test_a_dry_run_says_whether_features_fit_and_how_long_both_ways_take(
    data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "seconds_per_step", lambda job, width, grid: 2.0)
    monkeypatch.setattr(estimate, "seconds_per_view", lambda backbone, side: 0.5)
    flags = [*data, *SMALL, "--train.steps", "600", "--train.batch", "4", "--head.whiten", "0"]
    fits = plan(TrainJob, flags)
    assert any(line.endswith("MiB, stored (store.max_bytes is 20480 MiB)") for line in fits)
    # 600 steps of 2 s; 600 x 2 x 4 views, and those of calibration and fit, of 0.5 s.
    stored, streamed = "about 20 min from the store", "about 60 min streamed through the backbone"
    end = "on the CPU of this machine"
    assert fits[-1] == f"time of the steps: {stored} ({streamed}), {end}"
    large = plan(TrainJob, [*flags, "--store.max-bytes", "1000"])
    assert any(line.endswith("MiB, not stored (store.max_bytes is 0 MiB)") for line in large)
    assert large[-1] == f"time of the steps: {streamed} ({stored}), {end}"


def test_workers_share_the_steps_as_far_as_there_are_cpus(
    data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "seconds_per_step", lambda job, width, grid: 2.0)
    monkeypatch.setattr(estimate.os, "cpu_count", lambda: 64)
    flags = [*data, *SMALL, "--train.steps", "600", "--train.batch", "16"]
    assert "about 20 min from the store" in plan(TrainJob, flags)[-1]  # a worker has one thread
    assert "about 10 min from the store" in plan(TrainJob, [*flags, "--workers", "2"])[-1]
    assert "about 2 min from the store" in plan(TrainJob, [*flags, "--workers", "8"])[-1]


def test_the_plan_of_mining_alone_has_no_time_of_training(data: list[str]) -> None:
    lines = plan(MineJob, [*data, *SMALL])
    assert not any("time of the steps" in line for line in lines)
    assert any(line.startswith("mine: to do, 1 units, about 1 min") for line in lines)


def test_a_plan_says_what_a_run_would_refuse(data: list[str], tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path / "o"), job="mine")
    flags = [*data, *SMALL, "--backbone.precision", "fp32"]
    job = load_job(MineJob, flags, prog="test")
    files = list_images(str(tmp_path / "data"))
    record = mining_record(job, digest_files(files)) | {"stored": True}
    run.write_json("mine.json", {"record": record, "weights": {"sha256": "0"}})
    assert "mine: reuse" in plan(MineJob, flags)
    other = [*flags, "--views.resolution", "48", "--store.max-bytes", "0"]
    why = "other than what is there: stored, views.resolution"
    assert f"mine: refused without --overwrite, {why}" in plan(MineJob, other)
    assert any(line.startswith("mine: to do") for line in plan(MineJob, [*other, "--overwrite"]))


def test_what_nobody_knows_is_not_said(data: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "seconds_per_view", lambda backbone, side: None)
    lines = plan(TrainJob, [*data, *SMALL])
    assert "mine: to do, 1 units" in lines
    assert not any("time of the steps" in line for line in lines)


def test_the_plan_of_an_evaluation_says_what_becomes_of_features_and_how_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "seconds_per_view", lambda backbone, side: side)
    names = [f"{number}.png" for number in range(3)]
    tree = {f"imgs/val/{name}": png_bytes(picture()) for name in names}
    tree |= {f"labels/val/{name}": png_bytes(picture()[..., 0]) for name in names}
    root, model = write_tree(tmp_path / "data", tree), tmp_path / "model"
    card = {"backbone": {"name": "dinov2-vits14", "feature": "blocks", "blocks": [-1, -2]}}
    tensors = safetensors.numpy.save({"clusters": np.zeros((1, 1), np.float32)})
    write_tree(model, {"model.json": json.dumps(card).encode(), "model.safetensors": tensors})
    flags = ["--data.root", str(root), "--model", str(model), "--predict.resolution", "140"]

    def lines(*more: str) -> list[str]:
        return plan_evaluate(load_job(EvaluateJob, [*flags, *more], prog="test"))

    def last_line(*more: str) -> str:
        return lines(*more)[-1]

    # 3 images of 140 pixels a side, 140 s each.
    time = "time of the backbone: about 7 min on the CPU of this machine"
    assert time in lines()
    assert "... less where features are stored" in lines("--store.uri", "f")
    assert last_line() == "features: not stored (store.uri)"
    # 3 images of 10 x 10 tokens, two blocks of 384 channels, 4 bytes each: 921 600 bytes.
    assert last_line("--store.uri", "s3://b/f") == (
        "features: 1 MiB, stored (store.max_bytes is 20480 MiB) in s3://b/f"
    )
    twice = ["--store.uri", "f", "--store.max-bytes", "2000000"]
    assert ", stored" in last_line(*twice, "--flip")
    assert ", not stored" in last_line(*twice, "--flip", "--predict.scales", "1", "0.5")


def test_a_dry_run_says_what_to_do_where_the_disk_has_no_room_for_the_features(
    data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fs.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    (line,) = [line for line in plan(MineJob, [*data, *SMALL]) if line.startswith("mine: ")]
    assert " has 0 MiB free: make room, or train without storing them" in line
    streamed = plan(MineJob, [*data, *SMALL, "--store.max-bytes", "0"])
    assert any(line.startswith("mine: to do") for line in streamed)


def test_mining_begins_nothing_that_the_disk_can_not_hold(
    data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load_job(MineJob, [*data, *SMALL], prog="test")
    source = find_images(job)
    monkeypatch.setattr(mine_module, "settle_precision", lambda run, asked: "fp32")
    monkeypatch.setattr(mine_module, "replace_others", lambda *_: pytest.fail("began"))
    monkeypatch.setattr(fs.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with hold(job.out) as lease, pytest.raises(ConfigError, match="make room"):
        mine_module.mine(job, RunDirectory(job.out, job="mine"), source, lease)


def test_features_that_are_there_count_as_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "features")
    monkeypatch.setattr(fs.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert lacking_room(folder, 1000) is None
    assert "make room" in (lacking_room(folder, 1001) or "")
    (tmp_path / "features" / "key").mkdir(parents=True)
    (tmp_path / "features" / "key" / "unit-00000000.bin").write_bytes(b"0" * 500)
    assert lacking_room(folder, 1500) is None
    assert "make room" in (lacking_room(folder, 1501) or "")


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    assert fs.free_bytes("s3://bucket/run") is None
    free = fs.free_bytes(str(tmp_path / "not" / "there"))
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)

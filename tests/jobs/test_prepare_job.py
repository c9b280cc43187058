"""`prepare_data.py` as a user runs it, and training on what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from factories import picture, png_bytes, write_tree

ROOT = Path(__file__).parents[2]


def run(script: str, *flags: str, check: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "jobs" / script), *flags]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == check, done.stdout + done.stderr
    return done


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        for number in range(count):
            label = np.random.default_rng(number).integers(0, 12, (30, 40), dtype=np.uint8)
            files = {
                f"CamVid/{split}/{split}-{number}.png": png_bytes(picture(30, 40, seed=number)),
                f"CamVid/{split}annot/{split}-{number}.png": png_bytes(label),
            }
            write_tree(tmp_path / "source", files)
    return tmp_path / "source"


def test_a_dry_run_a_run_and_a_second_run_then_a_plan_of_training(source, tmp_path):
    out = tmp_path / "data"
    job = ["--dataset", "camvid", "--source", str(source), "--out", str(out), "--splits", "train"]
    plan = run("prepare_data.py", *job, "--dry-run")
    assert "11 classes: sky, building" in plan.stdout
    assert "train: 4 images, 4 with labels; 4 images to do" in plan.stdout.splitlines()
    assert not out.exists()
    run("prepare_data.py", *job)
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("done", 0)
    assert status["counts"] == {"train_images": 4, "train_labels": 4}
    times = {path: path.stat().st_mtime_ns for path in (out / "labels").rglob("*.png")}
    assert len(times) == 4
    run("prepare_data.py", *job)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    train = ["--data.root", str(out), "--out", str(tmp_path / "run"), "--dry-run"]
    lines = run("train.py", *train).stdout.splitlines()
    assert f"images: {out}/imgs/train: 4, labels: {out}/labels/train" in lines
    assert "label files: 4, images with one: 4 of 4" in lines
    assert not (tmp_path / "run").exists()


def test_every_problem_is_a_line_with_exit_code_3(source, tmp_path):
    (source / "CamVid/testannot/test-0.png").write_bytes(b"broken")
    label = np.full((30, 40), 77, np.uint8)
    (source / "CamVid/valannot/val-1.png").write_bytes(png_bytes(label))
    out = tmp_path / "data"
    job = ["--dataset", "camvid", "--source", str(source), "--out", str(out)]
    errors = [e for e in run("prepare_data.py", *job, check=3).stderr.splitlines() if "error" in e]
    assert len(errors) == 3
    assert "val: " in errors[1]
    assert "doesn't have: 77" in errors[1]
    assert "test-0.png" in errors[2]
    assert json.loads((out / "status.json").read_text())["exit_code"] == 3


def test_what_is_not_given_is_asked_for_with_exit_code_2(tmp_path):
    lines = run("prepare_data.py", "--out", str(tmp_path / "x"), check=2).stderr.splitlines()
    assert [line.split(": ")[2] for line in lines] == ["--dataset", "--source"]
    wrong = run("prepare_data.py", "--dataset", "imagenet", check=2).stderr
    assert "--dataset imagenet: must be 'cocostuff27'" in wrong
    assert not (tmp_path / "x").exists()

"""When a model is trained anew, and what a plan says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import picture, png_bytes, write_tree

from stego_core.config.method import HeadConfig, LossConfig
from stego_core.config.schema import DataConfig, TrainJob, ViewConfig
from stego_core.datasets.directory import open_dataset
from stego_core.distributed import train
from stego_core.storage.run import RunDirectory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {f"imgs/train/{n}.png": png_bytes(picture(seed=n)) for n in range(2)}
    return write_tree(tmp_path / "data", files)


def test_other_labels_are_another_training(root: Path) -> None:
    digests = []
    for number in range(3):
        digests.append(train._labels_digest(open_dataset(str(root), "train")))
        write_tree(root, {f"labels/train/{number}.png": png_bytes(picture(seed=number))})
    assert digests[0] is None
    assert len({*digests}) == 3
    assert train._labels_digest(open_dataset(str(root), "train")) not in digests


@pytest.mark.parametrize("state", ["mine: reuse", "mine: to do, 1 units"])
def test_a_plan_reuses_the_model_of_features_that_are_reused(
    state: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "plan_mine", lambda job: [state])
    job = TrainJob(data=DataConfig(root=str(root)), out=str(tmp_path / "run"))
    run = RunDirectory(job.out, job="train")
    run.write_json("train.json", {"settings": train._settings(job), "clusters": 5})
    run.write_json("model/model.json", {})
    says = {"mine: reuse": "train: reuse"}.get(state, "train: to do")
    assert train.plan_train(job)[-1].startswith(says)
    # Views are of the features, not of what the model's own record has.
    assert train._settings(replace(job, views=ViewConfig(crops="five"))) == train._settings(job)


def test_automatic_shifts_are_kept_apart_by_what_they_come_to() -> None:
    def settings(shifts: Any, whiten: int) -> object:
        job = TrainJob(loss=LossConfig(shifts=shifts), head=HeadConfig(whiten=whiten))
        return train._settings(job)

    assert settings("auto", 0) == settings("adaptive", 0)
    assert settings("auto", 64) != settings("adaptive", 64)


def test_a_plan_sees_that_labels_have_changed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "plan_mine", lambda job: ["mine: reuse"])
    job = TrainJob(data=DataConfig(root=str(root)), out=str(tmp_path / "run"))
    run = RunDirectory(job.out, job="train")
    run.write_json("train.json", {"settings": train._settings(job), "labels": None, "clusters": 5})
    run.write_json("model/model.json", {})
    assert train.plan_train(job)[-1].startswith("train: reuse")
    write_tree(root, {"labels/train/0.png": png_bytes(picture(seed=0))})
    assert train.plan_train(job)[-1].startswith("train: to do")

"""A study looks at the labels it is scored on before it spends hours on them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import picture, png_bytes, write_tree

from stego_core.config.backbone import BackboneConfig
from stego_core.config.base import Space
from stego_core.config.method import ClustersConfig
from stego_core.config.schema import DataConfig, TuneJob
from stego_core.distributed import tune
from stego_core.storage.run import RunDirectory


class Connected(Exception):
    """Raised where a study would start Ray."""


@pytest.fixture
def job(tmp_path: Path) -> TuneJob:
    root = write_tree(tmp_path / "data", {"classes.txt": b"sky\n"})
    for split, count in (("train", 2), ("val", 3)):
        for n in range(count):
            label = np.full((32, 48), 5 * (n == 2), np.uint8)
            files = {"imgs": picture(seed=n), "labels": label}
            tree = {f"{kind}/{split}/{n}.png": png_bytes(files[kind]) for kind in files}
            write_tree(root, tree)
    return TuneJob(
        out=str(tmp_path / "study"),
        data=DataConfig(root=str(root), limit=1),
        backbone=BackboneConfig(name="test_vit", weights="random"),
        clusters=ClustersConfig(count=5),
        space=Space({"head.dim": [8, 16]}),
    )


def start(job: TuneJob, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the events that a study leaves before it starts Ray."""

    def connect(**options: Any) -> None:
        raise Connected

    monkeypatch.setattr(tune, "connect", connect)
    with pytest.raises(Connected):
        tune.tune_study(job, RunDirectory(job.out, job="tune"))
    events = Path(job.out, "events.jsonl")
    return [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []


def test_a_study_checks_the_whole_split_that_it_is_scored_on(
    job: TuneJob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("stego_core"), "propagate", True)
    (event,) = start(job, monkeypatch)
    assert event["event"] == "data/check"
    assert event["images_uri"].endswith("/imgs/val")
    assert (event["images"], event["pairs"]) == (3, 3)  # `limit` is of the training
    assert [found["kind"] for found in event["findings"]] == ["unknown_class"]
    assert "hold values that are no class (classes.txt names 1)" in caplog.text


def test_labels_that_no_image_of_the_scored_split_has_are_told_and_end_no_study(
    job: TuneJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in Path(job.data.root, "labels", "val").iterdir():
        path.rename(path.with_name(f"other-{path.name}"))
    (event,) = start(job, monkeypatch)
    counts = {found["kind"]: found["count"] for found in event["findings"]}
    assert counts == {"images_without_label": 3, "labels_without_image": 3}


def test_a_study_that_is_scored_on_nothing_checks_nothing(
    job: TuneJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(job.data.root, "labels", "val").rename(Path(job.data.root, "elsewhere"))
    assert start(job, monkeypatch) == []


def test_the_plan_of_a_study_shows_what_is_odd_about_the_labels_it_is_scored_on(
    job: TuneJob,
) -> None:
    lines = tune.plan_tune(job)
    after = lines[lines.index(f"scored on: {job.data.root}/labels/val") + 1 :]
    assert after[0] == "label files: 3, images with one: 3 of 3"
    assert after[1].startswith("data: 1 of 3 label files looked into hold values that are no class")
    assert not Path(job.out).exists()

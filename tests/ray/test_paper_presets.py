"""A published row through the jobs: its commands, a tiny backbone, and every optional loss on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from dataset_commands import commands, placed, prepared, value
from official_trees import COUNTS
from PIL import Image
from ray_cluster import TINY, Cluster
from safetensors.numpy import load_file

from stego_core.config.load import load_job
from stego_core.config.schema import TrainJob
from stego_core.distributed.train import plan_train

pytestmark = pytest.mark.ray

NAME = "cityscapes27"
IMAGES = {split: images for split, (images, _) in COUNTS[NAME].items()}
SMALL = [*TINY, "--views.resolution", "64", "--clusters.sample", "2000"]
OPTIONS = [
    *("--loss.reconstruction", "0.1", "--loss.alignment", "0.1", "--loss.crf", "0.01"),
    *("--loss.salience", "--clusters.extra", "2", "--train.reset-probes-at", "4"),
    *("--train.steps", "6", "--train.batch", "4"),
]


def command(script: str, folder: Path) -> list[str]:
    """Return the flags of the row's command in docs/datasets.md."""
    model = f"runs/{NAME}"
    flag = {"train.py": "--out", "evaluate.py": "--model"}[script]
    (found,) = [each for each in commands(script) if value(each, flag) == model]
    return placed(found, folder)


def labelled_pixels(folder: Path) -> int:
    """Count what a centre square of 64 pixels of each label map leaves to score."""
    count = 0
    for path in folder.rglob("*.png"):
        label = Image.open(path)
        side, left = min(label.size), (label.width - label.height) // 2
        square = label.crop((left, 0, left + side, side))
        count += int((np.asarray(square.resize((64, 64), Image.Resampling.NEAREST)) < 255).sum())
    return count


def test_a_published_row_trains_and_scores_on_a_prepared_tree_with_every_option(
    cluster: Cluster, tmp_path: Path
) -> None:
    prepared(NAME, tmp_path)
    run, out = tmp_path / "runs" / NAME, tmp_path / "runs" / f"{NAME}-eval"
    settings = [*command("train.py", tmp_path), *SMALL]
    cluster.run("train.py", *settings, *OPTIONS)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    last = [event for event in events if event["event"] == "train/step"][-1]
    for name in ("self", "knn", "random", "reconstruction", "alignment", "crf", "linear"):
        assert np.isfinite(last[f"loss/{name}"])
    tensors = load_file(run / "model" / "model.safetensors")
    assert tensors["clusters"].shape == (27 + 2, 100)
    assert not any(name.startswith(("decoder", "whitening")) for name in tensors)
    # Crops of one image are neighbours only by the preset's `exclude_own = false`.
    table = pq.read_table(sorted((run / "neighbors").glob("*.parquet"))).to_pylist()
    assert len(table) == 5 * IMAGES["train"]
    assert any(row["image_id"] in row["neighbor_ids"] for row in table)
    # The same with another switch is another model, not one that is there already.
    for switch, plan in (
        ([], ["mine: reuse", "train: reuse"]),
        (["--compat.no-worker-mean"], ["mine: reuse", "train: to do"]),
        (["--compat.no-jpeg-crops"], ["mine: to do", "train: to do"]),
    ):
        job = load_job(TrainJob, [*settings, *OPTIONS, *switch], prog="train.py")
        lines = [line for line in plan_train(job) if line.startswith(("mine:", "train:"))]
        assert [line[: len(start)] for line, start in zip(lines, plan, strict=True)] == plan

    cluster.run("evaluate.py", *command("evaluate.py", tmp_path), "--predict.resolution", "64")
    protocol = json.loads((out / "protocol.json").read_text())
    assert all(protocol["compat"].values())
    assert protocol["crop"].startswith("centre square")
    pixels = pq.read_table(out / "metrics" / "confusion-cluster.parquet")["pixels"]
    assert sum(pixels.to_pylist()) == labelled_pixels(tmp_path / "data" / NAME / "labels" / "val")
    assert protocol["images"] == IMAGES["val"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert all(0 <= value <= 100 for value in metrics.values())

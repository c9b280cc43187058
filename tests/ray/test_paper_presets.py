"""The paper's presets through the jobs, with every optional loss on, on drawn pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from ray_cluster import ROOT, TRAIN, Cluster
from safetensors.numpy import load_file

from stego_core.config.load import load_job
from stego_core.config.schema import TrainJob
from stego_core.distributed.train import plan_train

pytestmark = pytest.mark.ray

PAPER = ["--config", str(ROOT / "configs" / "stego-paper.toml")]
SCORE = ["--config", str(ROOT / "configs" / "stego-paper-evaluate.toml")]
OPTIONS = [
    *("--loss.reconstruction", "0.1", "--loss.alignment", "0.1", "--loss.crf", "0.01"),
    *("--loss.salience", "--clusters.extra", "2", "--train.reset-probes-at", "4"),
    *("--train.steps", "6", "--train.batch", "4"),
]


def test_the_paper_s_way_trains_and_scores_with_every_option(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "eval"
    settings = [*PAPER, "--data.root", str(data), "--out", str(run), *TRAIN, "--head.whiten", "0"]
    cluster.run("train.py", *settings, *OPTIONS)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    last = [event for event in events if event["event"] == "train/step"][-1]
    for name in ("self", "knn", "random", "reconstruction", "alignment", "crf", "linear"):
        assert np.isfinite(last[f"loss/{name}"])
    tensors = load_file(run / "model" / "model.safetensors")
    assert tensors["clusters"].shape == (5, 70)
    assert not any(name.startswith(("decoder", "whitening")) for name in tensors)
    # Crops of one image are neighbours only by the preset's `exclude_own = false`.
    table = pq.read_table(sorted((run / "neighbors").glob("*.parquet"))).to_pylist()
    assert len(table) == 5 * 40
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

    common = ["--data.root", str(data), "--model", str(run), "--predict.resolution", "64"]
    cluster.run("evaluate.py", *SCORE, *common, "--out", str(out))
    protocol = json.loads((out / "protocol.json").read_text())
    assert all(protocol["compat"].values())
    assert protocol["crop"].startswith("centre square")
    pixels = pq.read_table(out / "metrics" / "confusion-cluster.parquet")["pixels"]
    assert sum(pixels.to_pylist()) == 12 * 64 * 64
    metrics = json.loads((out / "metrics.json").read_text())
    assert all(0 <= value <= 100 for value in metrics.values())

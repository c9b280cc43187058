"""Published rows through the jobs: their commands on small trees of the official layouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from dataset_commands import commands, placed, prepared, value
from lightning_files import save_checkpoint, state_dict
from official_trees import COUNTS
from PIL import Image
from ray_cluster import TINY, Cluster
from safetensors.numpy import load_file

from stego_core.config.load import load_job
from stego_core.config.schema import TrainJob
from stego_core.datasets.prepare import DATASETS
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


def evaluation_of(model: str) -> list[str]:
    """Return the flags of the command that evaluates a model."""
    (found,) = [each for each in commands("evaluate.py") if value(each, "--model") == model]
    return found


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
        (["--compat.no-jpeg-crops"], ["mine: refused", "train: to do"]),
        (["--compat.no-jpeg-crops", "--overwrite"], ["mine: to do", "train: to do"]),
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


def scores(out: Path, images: int) -> dict[str, float]:
    """Return the metrics of an evaluation after a look at whether they are any."""
    assert json.loads((out / "protocol.json").read_text())["images"] == images
    metrics: dict[str, float] = json.loads((out / "metrics.json").read_text())
    assert all(0 <= value <= 100 for value in metrics.values())
    return metrics


@pytest.mark.slow
@pytest.mark.parametrize("train", commands("train.py"), ids=lambda c: Path(value(c, "--out")).name)
def test_every_row_trains_and_scores(train: list[str], cluster: Cluster, tmp_path: Path) -> None:
    """With a tiny backbone and a few steps in place of the row's own; all else is the command."""
    name = Path(value(train, "--data.root")).name
    prepared(name, tmp_path)
    evaluate = evaluation_of(value(train, "--out"))
    settings = [*SMALL, "--train.steps", "4", "--train.batch", "4"]
    cluster.run("train.py", *placed(train, tmp_path), *settings)
    cluster.run("evaluate.py", *placed(evaluate, tmp_path), "--predict.resolution", "64")
    metrics = scores(tmp_path / value(evaluate, "--out"), COUNTS[name]["val"][0])
    assert {"cluster.miou", "linear.miou", "baseline_kmeans.miou"} <= metrics.keys()
    model = load_file(tmp_path / value(train, "--out") / "model" / "model.safetensors")
    assert len(model["clusters"]) == len(DATASETS[name].class_names)


@pytest.mark.slow
def test_the_row_of_the_released_checkpoint_is_imported_and_scores(
    cluster: Cluster, tmp_path: Path
) -> None:
    """With a file of the layout and size of the released one, whose numbers are drawn."""
    prepared("cocostuff27", tmp_path)
    (imported,) = commands("import_checkpoint.py")
    evaluate = evaluation_of(value(imported, "--out"))
    state = state_dict("dino-vitb8", classes=27, clusters=27, dim=90)
    file = tmp_path / Path(value(imported, "--checkpoint")).name
    save_checkpoint(file, state, classes=27, model_type="vit_base", dino_patch_size=8, dim=90)
    cluster.run("import_checkpoint.py", *placed(imported, tmp_path, tmp_path))
    cluster.run("evaluate.py", *placed(evaluate, tmp_path), "--predict.resolution", "64")
    metrics = scores(tmp_path / value(evaluate, "--out"), COUNTS["cocostuff27"]["val"][0])
    assert {"cluster.miou", "linear.miou"} <= metrics.keys()

"""The jobs against a real cluster: results, resuming, and what does not change them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray_cluster import SEGMENT, TRAIN, Cluster, draw_pictures, kill_midway, stopped
from safetensors.numpy import load_file

from stego_core.model.registry import find_backbone
from stego_core.model.weights import resolve_weights

pytestmark = pytest.mark.ray


def rows(out: Path) -> dict[int, dict]:
    table = pq.read_table(sorted((out / "masks").glob("*.parquet")))
    found = {row["image_id"]: row for row in table.to_pylist()}
    assert len(found) == table.num_rows, "an image has more than one row"
    return found


def status(out: Path) -> dict:
    return json.loads((out / "status.json").read_text())


def features_event(run: Path) -> dict:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return next(event for event in events if event["event"] == "evaluate/features")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_readable_elsewhere(paths: list[Path]) -> None:
    """Every table has the same rows for each reader, where neither Ray nor we can be imported."""
    script = Path(__file__).parents[1] / "plain_readers.py"
    command = [sys.executable, str(script), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["imported"] == []
    rows = [pq.read_metadata(path).num_rows for path in paths]
    assert len(rows) >= 6  # manifest, unit tables, neighbours, quarantine, metrics
    assert len(told["rows"]) >= 4
    assert told["rows"] == dict.fromkeys(told["rows"], rows)


def test_training_leaves_a_model_neighbours_and_a_record(model: Path) -> None:
    assert status(model)["state"] == "done"
    assert status(model)["exit_code"] == 0
    assert (model / "model" / "model.safetensors").exists()
    assert (model / "config.resolved.toml").exists()
    neighbors = pq.read_table(sorted((model / "neighbors").glob("*.parquet")))
    assert neighbors.num_rows == 40
    for row in neighbors.to_pylist():
        assert row["image_id"] not in row["neighbor_ids"]
        assert len(row["neighbor_ids"]) == 30
    events = [json.loads(line) for line in (model / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "train/step"] == [20, 30]
    expected = resolve_weights(find_backbone("test_vit"), "random")
    weights = json.loads((model / "mine.json").read_text())["weights"]
    assert weights == {"source": expected.source, "sha256": expected.sha256}


def test_the_resolved_configuration_reproduces_the_model(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    config = str(model / "config.resolved.toml")
    done = cluster.run("train.py", "--config", config, "--out", str(again))
    assert "train 30/30 (100 %)" in done.stderr  # what the worker did, told by the driver
    first, second = (load_file(r / "model" / "model.safetensors") for r in (model, again))
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)


def test_a_second_training_reuses_everything(cluster: Cluster, data: Path, model: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (model / "model").iterdir()}
    done = cluster.run("train.py", "--data.root", str(data), "--out", str(model), *TRAIN)
    assert "nothing to do" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in (model / "model").iterdir()} == before


def test_two_workers_train_the_same_model_as_one(
    cluster: Cluster, data: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "two"
    two_workers = ["--workers", "2", "--clusters.passes", "2"]
    cluster.run("train.py", "--data.root", str(data), "--out", str(out), *two_workers, *TRAIN)
    one, two = (load_file(r / "model" / "model.safetensors") for r in (model, out))
    for key in one:
        if key.startswith("head."):
            # Sums over workers are added in another order: float32 rounding over 30 Adam steps.
            assert abs(one[key] - two[key]).max() < 2e-4, key
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    cosines = [e["mean_cosine"] for e in events if e["event"] == "clusters/pass"]
    assert len(cosines) == 2
    assert 0 < cosines[0] <= cosines[1] <= 1


def test_one_and_two_actors_give_the_same_bytes_as_a_killed_and_resumed_run(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 60, seed=3)
    small = ["--predict.resolution", "96", "--predict.unit-images", "2"]
    common = ["--input", str(pictures), "--model", str(model), *small]
    cluster.run("segment_bucket.py", *common, "--out", str(tmp_path / "one"), "--actors", "1")
    cluster.run("segment_bucket.py", *common, "--out", str(tmp_path / "two"), "--actors", "2")
    expected = files(tmp_path / "one" / "masks")
    assert files(tmp_path / "two" / "masks") == expected
    assert len(rows(tmp_path / "one")) == 60

    def units(out: Path) -> list[Path]:
        return list(out.glob("_units/*/*.parquet"))

    killed = kill_midway(
        lambda out: cluster.start("segment_bucket.py", *common, "--out", str(out)),
        tmp_path,
        is_time=units,
        is_over=lambda out: (out / "_SUCCESS").exists() or not 0 < len(units(out)) < 30,
    )
    cluster.run("segment_bucket.py", *common, "--out", str(killed))
    assert files(killed / "masks") == expected
    assert not list(killed.glob("_units/*"))
    assert status(killed)["counts"] == {"total": 60, "done": 60, "ok": 60}


def test_a_finished_segmentation_is_left_alone_and_other_settings_are_refused(
    cluster: Cluster, model: Path, data: Path, tmp_path: Path
) -> None:
    common = ["--input", str(data / "imgs" / "val"), "--model", str(model), *SEGMENT]
    out = tmp_path / "out"
    cluster.run("segment_bucket.py", *common, "--out", str(out))
    before = files(out / "masks")
    times = {p: p.stat().st_mtime_ns for p in (out / "masks").iterdir()}
    assert "nothing to do" in cluster.run("segment_bucket.py", *common, "--out", str(out)).stderr
    assert {p: p.stat().st_mtime_ns for p in (out / "masks").iterdir()} == times
    refused = cluster.run("segment_bucket.py", *common, "--flip", "--out", str(out), check=2)
    assert "flip differ" in refused.stderr
    assert files(out / "masks") == before
    assert status(out)["state"] == "done"
    # The settings that it left make the same masks, on a Ray of this machine's size as well.
    alone = replace(cluster, env=cluster.env | {"RAY_ADDRESS": "local"})
    assert_readable_elsewhere([*model.rglob("*.parquet"), *out.rglob("*.parquet")])
    config, again = str(out / "config.resolved.toml"), tmp_path / "again"
    done = alone.run("segment_bucket.py", "--config", config, "--out", str(again))
    assert "started a local Ray" in done.stderr
    assert files(again / "masks") == before
    cluster.run("segment_bucket.py", *common, "--flip", "--overwrite", "--out", str(out))
    assert files(out / "masks") != before


def test_original_size_and_crf_give_masks_of_the_right_size(
    cluster: Cluster, model: Path, data: Path, tmp_path: Path
) -> None:
    common = ["--input", str(data / "imgs" / "val"), "--model", str(model), *SEGMENT]
    cluster.run("segment_bucket.py", *common, "--mask-size", "original", "--out", f"{tmp_path}/a")
    extra = ["--crf", "--predict.tile", "32", "--predict.scales", "0.5", "1", "--limit", "4"]
    cluster.run("segment_bucket.py", *common, *extra, "--out", f"{tmp_path}/b")
    for row in rows(tmp_path / "a").values():
        assert (row["mask_height"], row["mask_width"]) == (row["image_height"], row["image_width"])
        assert sum(c["pixels"] for c in row["clusters"]) == row["mask_height"] * row["mask_width"]
    assert len(rows(tmp_path / "b")) == 4
    assert {row["status"] for row in rows(tmp_path / "b").values()} == {"ok"}


def test_evaluation_scores_head_and_baseline_over_all_labels(
    cluster: Cluster, model: Path, data: Path, tmp_path: Path
) -> None:
    common = ["--data.root", str(data), "--data.split", "val", "--model", str(model)]
    out = tmp_path / "eval"
    cluster.run("evaluate.py", *common, "--out", str(out), *SEGMENT)
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"cluster.miou", "cluster.accuracy", "baseline_kmeans.miou", "linear.miou"} <= set(
        metrics
    )
    assert all(0 <= value <= 100 for value in metrics.values())
    pixels = pq.read_table(out / "metrics" / "confusion-cluster.parquet")["pixels"]
    sizes = [Image.open(path).size for path in (data / "labels" / "val").iterdir()]
    assert sum(pixels.to_pylist()) == sum(width * height for width, height in sizes)
    images = pq.read_table(out / "metrics" / "images.parquet").to_pylist()
    right = sum(row["accuracy"] * row["pixels"] for row in images)
    assert sum(row["pixels"] for row in images) == sum(pixels.to_pylist())
    assert right / sum(pixels.to_pylist()) == pytest.approx(metrics["cluster.accuracy"], abs=1e-3)
    config, again = str(out / "config.resolved.toml"), tmp_path / "again"
    store = ["--store.uri", "kept-features"]  # below the folder in which the jobs start
    cluster.run("evaluate.py", "--config", config, "--out", str(again), *store)
    assert (again / "metrics.json").read_bytes() == (out / "metrics.json").read_bytes()
    assert files(again / "metrics") == files(out / "metrics")
    # The same split with a picture that can't be decoded.
    worse = Path(shutil.copytree(data, tmp_path / "worse"))
    (worse / "imgs" / "val" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    common[1] = str(worse)
    refused = [*common, "--out", f"{tmp_path}/b", "--max-failed", "0.05", *SEGMENT]
    assert "--max-failed" in cluster.run("evaluate.py", *refused, check=4).stderr
    assert not (tmp_path / "b" / "metrics.json").exists()
    cluster.run(
        "evaluate.py",
        *common,
        "--out",
        f"{tmp_path}/b",
        "--data.ignore-classes",
        "2",
        "--actors",
        "2",
        *SEGMENT,
        *store,
    )
    (torn,) = pq.read_table(tmp_path / "b" / "quarantine.parquet").to_pylist()
    assert torn["image_uri"].endswith("/torn.png")
    assert (torn["stage"], torn["reason"]) == ("evaluate", "not_an_image")
    # The backbone ran once for both, and what it left is not part of a result.
    assert features_event(again)["read"] == features_event(tmp_path / "b")["kept"] == 0
    assert features_event(again)["kept"] == features_event(tmp_path / "b")["read"] > 0
    assert list((cluster.folder / "kept-features").rglob("*.safetensors"))
    confusion = "metrics/confusion-baseline_kmeans.parquet"
    counts = [pq.read_table(run / confusion).to_pylist() for run in (out, tmp_path / "b")]
    assert [row for row in counts[0] if row["true_class"] != 2] == counts[1]
    scored = pq.read_table(tmp_path / "b" / "metrics" / "metrics.parquet").to_pylist()
    assert {r["class_id"] for r in scored if r["metric"] == "iou"} == {0, 1}


def test_a_killed_training_goes_on_from_its_checkpoint(
    cluster: Cluster, data: Path, model: Path, tmp_path: Path
) -> None:
    job = ["train.py", "--data.root", str(data), *TRAIN, "--out"]

    def start(out: Path) -> subprocess.Popen:
        process = cluster.start(*job, str(out))
        with stopped(process, out):
            second = cluster.run(*job, str(out), check=2)
        assert f"another job (process {process.pid} on " in second.stderr
        return process

    killed = kill_midway(
        start,
        tmp_path,
        is_time=lambda out: list(out.glob("checkpoints/*/*/step-*/state.json")),
        is_over=lambda out: (out / "model").exists(),
    )
    # A kill in the middle of Ray Train's own record would leave this.
    for record in killed.glob("checkpoints/*/*/checkpoint_manager_snapshot.json"):
        record.write_text("{")
    cluster.run(*job, str(killed))
    events = [json.loads(line) for line in (killed / "events.jsonl").read_text().splitlines()]
    assert any(e["event"] == "train/resumed" and e["step"] >= 10 for e in events)
    one, two = (load_file(r / "model" / "model.safetensors") for r in (model, killed))
    assert all((one[key] == two[key]).all() for key in one), "resuming changed the model"

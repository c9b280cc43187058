"""A study on a real cluster: killed and resumed, stopped early, read back."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray_cluster import TRAIN, Cluster, kill_midway
from safetensors.numpy import load_file

pytestmark = pytest.mark.ray

SPACE = "[space]\nhead.dim = [3, 8]\ntrain.head_lr = [1e-3, 1e-2]\n"
TUNE = [*TRAIN, "--predict.resolution", "96", "--tune.sampler", "grid", "--tune.seeds", "1"]


def study(tmp_path: Path, data: Path, *flags: str, space: str = SPACE) -> list[str]:
    config = tmp_path / "space.toml"
    config.write_text(space)
    return ["tune.py", "--config", str(config), "--data.root", str(data), *TUNE, *flags]


def ended(out: Path) -> dict[str, int]:
    """Return when each record was written: a trial that was run again has another time."""
    return {path.stem: path.stat().st_mtime_ns for path in (out / "trials").glob("*.json")}


def test_a_killed_study_goes_on_and_has_each_trial_once(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    command = study(tmp_path, data, "--out")
    plan = cluster.run(*command, str(out), "--dry-run").stdout
    assert "trials: 4 of 4 settings, 0 done" in plan
    assert "minings: 1" in plan
    assert not out.exists()

    out = kill_midway(
        lambda out: cluster.start(*command, str(out)),
        tmp_path,
        is_time=ended,
        is_over=lambda out: len(ended(out)) == 4 or (out / "trials.parquet").exists(),
    )
    before = ended(out)

    cluster.run(*command, str(out))
    after = ended(out)
    assert len(after) == 4
    assert {key: after[key] for key in before} == before, "a finished trial was run again"
    rows = pq.read_table(out / "trials.parquet").to_pylist()
    assert {row["trial"] for row in rows} == {*after}
    assert sorted((row["head.dim"], row["train.head_lr"]) for row in rows) == [
        (3, 1e-3),
        (3, 1e-2),
        (8, 1e-3),
        (8, 1e-2),
    ]
    assert {row["status"] for row in rows} == {"finished"}
    assert all(0 < row["miou"] <= 100 and -1 <= row["agreement"] <= 1 for row in rows)
    assert len(list((out / "mined").iterdir())) == 1
    assert len(list((out / "labelled").iterdir())) == 1
    assert not list((out / "trials").glob("*/state"))
    assert not (out / "ray-tune").exists()
    assert pq.read_table(out / "importance.parquet").num_rows == 3
    assert "head.dim" in (out / "report" / "index.html").read_text()

    # What was chosen is the model of the best trial, and scored by evaluate.py as it was here.
    best = max(rows, key=lambda row: row["agreement"])
    chosen = load_file(out / "trials" / best["trial"] / "model" / "model.safetensors")
    kept = load_file(out / "model" / "model.safetensors")
    assert all((kept[key] == chosen[key]).all() for key in chosen)
    evaluated = tmp_path / "evaluated"
    split = ["--data.root", str(data), "--data.split", "val", "--predict.resolution", "96"]
    cluster.run("evaluate.py", *split, "--model", str(out), "--out", str(evaluated))
    metrics = json.loads((evaluated / "metrics.json").read_text())
    # Features are stored in half precision: a pixel on a border may fall to the other side.
    assert metrics["cluster.miou"] == pytest.approx(best["miou"], abs=0.5)

    again = cluster.run(*command, str(out))
    assert ended(out) == after
    assert "4 of them done" in again.stderr

    retrained = tmp_path / "retrained"
    cluster.run("train.py", "--config", str(out / "best.toml"), "--out", str(retrained))
    model = load_file(retrained / "model" / "model.safetensors")
    assert all(abs(model[key] - chosen[key]).max() < 2e-3 for key in model if key in chosen)


def test_bad_trials_end_at_a_rung_and_a_broken_one_is_a_row(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    config = tmp_path / "space.toml"
    # More clusters than codes in half of the sample: an error of that trial, not of the study.
    config.write_text("[space]\nclusters.count = [3, 4, 5, 1900]\n")
    flags = ["--config", str(config), "--data.root", str(data), "--out", str(out), *TUNE]
    flags += ["--tune.rungs", "5", "15", "--tune.keep", "0.1"]
    cluster.run("tune.py", *flags)
    rows = pq.read_table(out / "trials.parquet").to_pylist()
    statuses = {row["clusters.count"]: row["status"] for row in rows}
    assert statuses[3] == "finished"
    assert "stopped" in {statuses[4], statuses[5]}
    assert statuses[1900] == "failed"
    failed = next(row for row in rows if row["status"] == "failed")
    assert "usable codes for 1900 clusters" in failed["error"]
    stopped = next(row for row in rows if row["status"] == "stopped")
    assert stopped["steps"] in (5, 15)
    assert stopped["miou"] is None
    records = [json.loads(path.read_text()) for path in (out / "trials").glob("*.json")]
    whole = next(record for record in records if record["values"] == {"clusters.count": 3})
    assert [step for step, _ in whole["rungs"]] == [5, 15]
    assert not list((out / "trials").glob("*/state"))


def test_a_mistake_in_the_space_is_told_and_leaves_nothing(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    config = tmp_path / "space.toml"
    config.write_text("[space]\nhead.dimm = [3]\nseed = [1]\n")
    flags = ["--config", str(config), "--data.root", str(data), "--out", str(out)]
    done = cluster.run("tune.py", *flags, check=2)
    assert "did you mean head.dim?" in done.stderr
    assert "seeds are given by tune.seeds" in done.stderr
    assert not out.exists()


def test_settings_of_the_search_and_of_prediction_share_features(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    flags = ["--tune.sampler", "one-at-a-time", "--views.crops", "five", "--data.limit", "6"]
    space = "[space]\nneighbors.exclude_own = [false]\npredict.resolution = [128]\n"
    done = cluster.run(*study(tmp_path, data, "--out", str(out), *flags, space=space))
    assert done.stderr.count("features: reused") == 1
    assert len(list((out / "features").iterdir())) == 1
    folders = sorted((out / "mined").iterdir())
    assert len(folders) == 2
    assert not any((folder / "features").exists() for folder in folders)
    rows = pq.read_table(out / "trials.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"finished"}
    found = {(row["neighbors.exclude_own"], row["predict.resolution"]): row for row in rows}
    assert {*found} == {(True, 96), (False, 96), (True, 128)}
    # The same model, seen at two sizes.
    one, other = found[True, 96], found[True, 128]
    assert one["agreement"] == other["agreement"]
    assert one["miou"] != other["miou"]
    assert len(list((out / "labelled").iterdir())) == 2

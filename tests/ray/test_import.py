"""An imported checkpoint goes through the jobs like a trained model."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from lightning_files import save_checkpoint, state_dict, write_archive
from ray_cluster import SEGMENT, Cluster

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def offline(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A driver without cached weights; the hub is off in all tests."""
    cache = tmp_path_factory.mktemp("empty-cache")
    return replace(cluster, env=cluster.env | {"XDG_CACHE_HOME": str(cache)})


@pytest.fixture(scope="module")
def imported(offline: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    state = state_dict("dino-vits16", classes=3, clusters=3)
    path = save_checkpoint(folder / "c.ckpt", state, classes=3)
    offline.run("import_checkpoint.py", "--checkpoint", str(path), "--out", str(folder / "run"))
    path.unlink()
    shutil.move(folder / "run", folder / "moved")
    status = json.loads((folder / "moved" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("done", 0)
    return folder / "moved"


def test_an_imported_model_segments_and_is_scored_without_the_baseline(
    offline: Cluster, imported: Path, data: Path, tmp_path: Path
) -> None:
    model = ["--model", str(imported), *SEGMENT, "--flip"]
    pictures = str(data / "imgs" / "val")
    offline.run("segment_bucket.py", "--input", pictures, *model, "--out", str(tmp_path / "m"))
    rows = pq.read_table(sorted((tmp_path / "m" / "masks").glob("*.parquet")))
    assert rows["status"].to_pylist() == ["ok"] * 12
    score = ["--data.root", str(data), *model, "--out", str(tmp_path / "e")]
    offline.run("evaluate.py", *score)
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert {"cluster.miou", "linear.miou"} <= metrics.keys()
    assert not [name for name in metrics if name.startswith("baseline")]
    report = ["--masks", str(tmp_path / "m"), "--model", str(imported)]
    offline.run("report.py", *report)
    page = tmp_path / "m" / "report" / "index.html"
    assert "checkpoint c.ckpt" in page.read_text()
    first = page.read_bytes()
    offline.run("report.py", "--config", str(page.with_name("config.resolved.toml")))
    assert page.read_bytes() == first


def test_the_resolved_configuration_of_an_import_makes_the_same_model(
    offline: Cluster, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path / "c.ckpt", state_dict("dino-vits16"))
    offline.run("import_checkpoint.py", "--checkpoint", str(path), "--out", str(tmp_path / "a"))
    config = str(tmp_path / "a" / "config.resolved.toml")
    offline.run("import_checkpoint.py", "--config", config, "--out", str(tmp_path / "b"))
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / run / "model").iterdir()} for run in "ab"
    )
    assert len(first) == 3
    assert first == second


def test_a_dry_run_says_what_is_in_the_file_and_leaves_nothing_behind(
    offline: Cluster, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path / "c.ckpt", state_dict("dino-vits16"))
    flags = ["--checkpoint", str(path), "--out", str(tmp_path / "run"), "--dry-run"]
    done = offline.run("import_checkpoint.py", *flags)
    assert "dino-vits16" in done.stdout
    assert str(tmp_path / "run") in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["c.ckpt"]


class Attack:
    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self):
        return os.system, (self._command,)


def test_a_hostile_file_and_a_missing_one_are_one_line_each(
    offline: Cluster, tmp_path: Path
) -> None:
    marker = tmp_path / "it-ran"
    content = {"state_dict": {}, "hyper_parameters": Attack(f"touch {marker}")}
    hostile = write_archive(tmp_path / "h.ckpt", pickle.dumps(content, 2))
    for path, code, word in ((hostile, 2, "posix.system"), (tmp_path / "no.ckpt", 3, "no.ckpt")):
        flags = ["--checkpoint", str(path), "--out", str(tmp_path / "run")]
        done = offline.run("import_checkpoint.py", *flags, check=code)
        (line,) = done.stderr.splitlines()
        assert word in line
    assert not marker.exists()

"""The jobs from bucket to bucket, against a server that speaks as Google's storage does."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google_store import GOOGLE_BUCKET, needs_google
from ray_cluster import SEGMENT, TRAIN, Cluster

from stego_core.storage import fs, uris

pytestmark = [pytest.mark.ray, pytest.mark.slow, needs_google]
ROOT = f"gs://{GOOGLE_BUCKET}/pipeline"


@pytest.fixture
def google_cluster(
    cluster: Cluster, google_store: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    """A cluster that is older than its jobs: workers hear of the store from the driver."""
    for name, value in google_store.items():
        monkeypatch.setenv(name, value)
    uris._gcs.cache_clear()
    yield replace(cluster, env=cluster.env | google_store)
    uris._gcs.cache_clear()


def masks(folder: str) -> pa.Table:
    names = [name for name in fs.list_names(folder) if name.endswith(".parquet")]
    tables = [pq.read_table(io.BytesIO(fs.read_bytes(f"{folder}/{name}"))) for name in names]
    return pa.concat_tables(tables).select(["image_id", "status", "mask", "clusters"])


def test_training_segmentation_evaluation_and_report_pass_from_bucket_to_bucket(
    google_cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    for path in sorted(p for p in data.rglob("*") if p.is_file()):
        fs.write_bytes(f"{ROOT}/data/{path.relative_to(data).as_posix()}", path.read_bytes())
    train = ["--data.root", f"{ROOT}/data", "--out", f"{ROOT}/run", *TRAIN]
    segment = ["--input", f"{ROOT}/data/imgs/val", "--model", f"{ROOT}/run", *SEGMENT]
    score = ["--data.root", f"{ROOT}/data", "--model", f"{ROOT}/run", "--out", f"{ROOT}/eval"]
    show = ["--masks", f"{ROOT}/out", "--model", f"{ROOT}/run", "--metrics", f"{ROOT}/eval"]
    google_cluster.run("train.py", *train)
    google_cluster.run("segment_bucket.py", *segment, "--out", f"{ROOT}/out")
    google_cluster.run("evaluate.py", *score, *SEGMENT)
    google_cluster.run("report.py", *show)
    for name in ("run", "out", "eval", "out/report"):
        status = json.loads(fs.read_bytes(f"{ROOT}/{name}/status.json"))
        assert (status["state"], status["exit_code"]) == ("done", 0), name
    assert (
        "nothing to do"
        in google_cluster.run("segment_bucket.py", *segment, "--out", f"{ROOT}/out").stderr
    )
    assert "features: reused" in google_cluster.run("train.py", *train).stderr
    # The same pictures in a folder, by the same model.
    local = ["--input", str(data / "imgs" / "val"), "--model", f"{ROOT}/run", *SEGMENT]
    google_cluster.run("segment_bucket.py", *local, "--out", str(tmp_path / "out"))
    found = masks(f"{ROOT}/out/masks")
    assert found.num_rows == 12
    assert found == masks(str(tmp_path / "out" / "masks"))


def test_a_training_that_was_killed_goes_on_from_its_checkpoint_in_the_bucket(
    google_cluster: Cluster, data: Path
) -> None:
    out = f"{ROOT}/killed"
    job = ["train.py", "--data.root", str(data), "--out", out, *TRAIN]
    job += ["--train.steps", "120", "--train.checkpoint-every", "20"]
    first = google_cluster.start(*job)
    while not any(name.startswith("step-") for name in _steps(out)):
        assert first.poll() is None
        time.sleep(0.5)
    first.kill()
    first.wait()
    google_cluster.run(*job)
    text = fs.read_bytes(f"{out}/events-train.jsonl").decode()
    starts = [json.loads(line) for line in text.splitlines()]
    resumed = [event["step"] for event in starts if event["event"] == "train/resumed"]
    assert len(resumed) == 1
    assert resumed[0] >= 20


def _steps(out: str) -> list[str]:
    found = [f"{out}/checkpoints"]
    for _ in ("training", "start", "step"):
        found = [f"{folder}/{name}" for folder in found for name in fs.list_names(folder)]
    return [folder.rpartition("/")[2] for folder in found]

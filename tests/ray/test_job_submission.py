"""The card's two commands, literally, against a real cluster, from the repository's root.

They do the demo's work with real backbone weights; without those in the cache there is nothing to
run (`make demo` fetches them).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray_cluster import TINY, Cluster

from stego_core.model.registry import find_backbone
from stego_core.model.weights import cache_path

pytestmark = pytest.mark.ray
HAS_WEIGHTS = cache_path(find_backbone("dinov2-vits14")).exists()


def submit(cluster: Cluster, *arguments: str) -> str:
    ray = str(Path(sys.executable).parent / "ray")
    for _ in range(30):
        done = subprocess.run(
            [ray, "job", "submit", "--address", cluster.dashboard, *arguments],
            cwd=cluster.folder,
            env=cluster.env,
            capture_output=True,
            text=True,
            timeout=900,
        )
        # The dashboard of a young cluster answers before the agent that runs jobs is there.
        if "No available agent" not in done.stderr:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.skipif(not HAS_WEIGHTS, reason="DINOv2 weights are not in the cache; run make demo")
def test_the_literal_commands_train_and_segment_the_demo_pictures(cluster: Cluster) -> None:
    submit(cluster, "jobs/train.py")
    submit(cluster, "jobs/segment_bucket.py")
    runs = cluster.folder / "runs"
    status = json.loads((runs / "default-masks" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("done", 0)
    table = pq.read_table(sorted((runs / "default-masks" / "masks").glob("*.parquet")))
    pictures = list((runs / "demo-images").iterdir())
    assert table.num_rows == len(pictures) > 50
    assert set(table["status"].to_pylist()) == {"ok"}


def test_training_and_segmentation_are_submitted_with_settings_from_files(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    """The two commands above with a tiny network, for machines without weights."""
    run, out = tmp_path / "run", tmp_path / "masks"
    pictures = data / "imgs" / "val"
    settings = {
        "train": f"""
            out = "{run}"
            data.root = "{pictures}"
            backbone = {{ name = "test_vit", weights = "random" }}
            views.resolution = 64
            head.whiten = 4
            train = {{ steps = 5, batch = 4 }}
            clusters = {{ count = 3, sample = 500 }}
        """,
        "segment_bucket": f"""
            out = "{out}"
            input = "{pictures}"
            model = "{run}"
            predict.resolution = 64
        """,
    }
    for job, text in settings.items():
        (cluster.folder / f"{job}.toml").write_text(text)
        command = ["python", f"jobs/{job}.py", "--config", f"{job}.toml"]
        submit(cluster, "--working-dir", ".", "--", *command)
    rows = pq.read_table(sorted((out / "masks").glob("*.parquet"))).to_pylist()
    names = sorted(path.name for path in pictures.iterdir())
    assert sorted(Path(row["image_uri"]).name for row in rows) == names
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["mask"]["bytes"].startswith(b"\x89PNG") for row in rows)


def test_a_working_directory_and_flags_can_be_given(cluster: Cluster, data: Path) -> None:
    out = cluster.folder / "submitted"
    command = ["--working-dir", ".", "--", "python", "jobs/mine_neighbors.py"]
    submit(cluster, *command, "--data.root", str(data), "--out", str(out), *TINY)
    assert json.loads((out / "status.json").read_text())["exit_code"] == 0
    assert pq.read_table(sorted((out / "neighbors").glob("*.parquet"))).num_rows == 40

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
from ray_cluster import Cluster

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


def test_training_and_segmentation_are_submitted_with_a_file_and_with_flags(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    """The two commands above with a tiny network, for machines without weights."""
    run, out = tmp_path / "run", tmp_path / "masks"
    pictures = data / "imgs" / "val"
    (cluster.folder / "small.toml").write_text(f"""
        out = "{run}"
        data.root = "{pictures}"
        backbone = {{ name = "test_vit", weights = "random" }}
        views.resolution = 64
        head.whiten = 4
        train = {{ steps = 5, batch = 4 }}
        clusters = {{ count = 3, sample = 500 }}
    """)
    command = ["--working-dir", ".", "--", "python"]
    submit(cluster, *command, "jobs/train.py", "--config", "small.toml")
    assert json.loads((run / "status.json").read_text())["exit_code"] == 0
    flags = ["--input", str(pictures), "--model", str(run), "--out", str(out)]
    submit(cluster, *command, "jobs/segment_bucket.py", *flags, "--predict.resolution", "64")
    rows = pq.read_table(sorted((out / "masks").glob("*.parquet"))).to_pylist()
    names = sorted(path.name for path in pictures.iterdir())
    assert sorted(Path(row["image_uri"]).name for row in rows) == names
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["mask"]["bytes"].startswith(b"\x89PNG") for row in rows)

"""The README's two commands, literally, against a real cluster, from the repository's root.

With the real backbone weights they do the whole demo, in minutes; without those in the cache there
is nothing to run (`make demo` fetches them). With random weights and less of everything the same
two commands run always.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray_cluster import STAND_IN, Cluster, checkout, free_ports, ray_head, stand_in_weights

from stego_core.model.registry import find_backbone
from stego_core.model.weights import cache_path

pytestmark = pytest.mark.ray
HAS_WEIGHTS = cache_path(find_backbone("dinov2-vits14")).exists()
# Lines of the package, and what stands for them in a copy whose demo takes seconds: of each
# photograph itself and one crop, small, and a few steps.
SHORTER = {
    "datasets/demo.py": ("_CROPS = 8", "_CROPS = 1"),
    "config/schema.py": ("resolution: Positive = 320", "resolution: Positive = 112"),
    "config/predict.py": ("resolution: Positive = 320", "resolution: Positive = 112"),
    "config/method.py": ("steps: NonNegative = 300", "steps: NonNegative = 5"),
}


def submit(cluster: Cluster, *arguments: str) -> str:
    """Run `ray job submit` with these arguments; the environment says where the cluster is."""
    for _ in range(30):
        done = subprocess.run(
            ["ray", "job", "submit", *arguments],
            cwd=cluster.folder,
            env=cluster.env | {"RAY_API_SERVER_ADDRESS": cluster.dashboard},
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


def submit_the_literal_commands(cluster: Cluster, *, pictures: int, weights: str | None) -> None:
    """Train and segment; check both jobs' status, a mask for every picture and what made them.

    Args:
        cluster: started in a checkout whose `runs/` is empty.
        pictures: at least so many must be there.
        weights: where those of the backbone must have come from; None takes any.
    """
    submit(cluster, "jobs/train.py")
    submit(cluster, "jobs/segment_bucket.py")
    runs = cluster.folder / "runs"
    for name in ("default", "default-masks"):
        status = json.loads((runs / name / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("done", 0), name
    mined = json.loads((runs / "default" / "mine.json").read_text())
    assert weights in (None, mined["weights"]["source"])
    rows = pq.read_table(sorted((runs / "default-masks" / "masks").glob("*.parquet"))).to_pylist()
    names = sorted(path.name for path in (runs / "demo-images").iterdir())
    assert len(names) >= pictures
    assert sorted(Path(row["image_uri"]).name for row in rows) == names
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["mask"]["bytes"].startswith(b"\x89PNG") for row in rows)


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.skipif(not HAS_WEIGHTS, reason="DINOv2 weights are not in the cache; run make demo")
def test_the_literal_commands_train_and_segment_the_demo_pictures(cluster: Cluster) -> None:
    submit_the_literal_commands(cluster, pictures=50, weights=None)


@pytest.fixture
def short_cluster(cluster: Cluster, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of its own, started in a copied checkout whose demo is short.

    What `ray job submit` runs has the environment of the head, so a cache folder needs a head.
    """
    folder = checkout(tmp_path / "checkout")
    for name, (line, shorter) in SHORTER.items():
        text = (folder / "stego_core" / name).read_text()
        assert text.count(line) == 1, name
        (folder / "stego_core" / name).write_text(text.replace(line, shorter))
    stand_in_weights(tmp_path / "cache")
    env = {name: value for name, value in cluster.env.items() if name != "RAY_ADDRESS"}
    env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    (port,) = free_ports(1)
    flags = ["--num-cpus=2", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    with ray_head(folder, "ray.log", env, *flags, ready_port=port) as address:
        env |= {"RAY_ADDRESS": address}
        yield Cluster(address, f"http://127.0.0.1:{port}", folder, env)


def test_the_literal_commands_train_and_segment_a_short_demo_on_random_weights(
    short_cluster: Cluster,
) -> None:
    """As above for every run of the suite: 22 pictures instead of 99, 112 pixels instead of 320 and
    5 steps instead of 300, by lines of the copied checkout; no flag, no file, no `--address`.
    """
    submit_the_literal_commands(short_cluster, pictures=10, weights=STAND_IN)


def test_training_and_segmentation_are_submitted_with_a_file_and_with_flags(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    """The two jobs with settings of a user's own, in a directory that Ray takes along."""
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

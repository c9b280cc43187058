"""What must hold with real weights and real photographs; minutes of work, so `pytest -m slow`."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray_cluster import Cluster, kill_when

from stego_core.datasets.demo import write_demo_images
from stego_core.model.registry import find_backbone
from stego_core.model.weights import cache_path

HAS_WEIGHTS = cache_path(find_backbone("dinov2-vits14")).exists()
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.weights,
    pytest.mark.skipif(not HAS_WEIGHTS, reason="DINOv2 weights are not in the cache"),
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 pictures: the demo's, mirrored, and some upside down."""
    folder = Path(write_demo_images(str(tmp_path_factory.mktemp("photographs"))))
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / f"mirrored-{path.name}")
    for path in sorted(folder.glob("mirrored-*"))[: 200 - len(list(folder.iterdir()))]:
        with Image.open(path) as image:
            image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(folder / f"down-{path.name}")
    assert len(list(folder.iterdir())) == 200
    return folder


def masks(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "masks").iterdir()}


def test_actors_and_a_kill_change_no_byte_of_200_segmented_photographs(
    cluster: Cluster, photographs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train = ["--train.steps", "20", "--clusters.count", "12", "--data.limit", "64"]
    cluster.run("train.py", "--data.root", str(photographs), "--out", str(run), *train)
    common = ["--input", str(photographs), "--model", str(run)]
    cluster.run("segment_bucket.py", *common, "--out", str(tmp_path / "one"))
    cluster.run("segment_bucket.py", *common, "--out", str(tmp_path / "two"), "--actors", "2")
    expected = masks(tmp_path / "one")
    assert masks(tmp_path / "two") == expected
    killed = tmp_path / "killed"
    process = cluster.start("segment_bucket.py", *common, "--out", str(killed))
    kill_when(process, lambda: len(list(killed.glob("_units/*/*.parquet"))) >= 3)
    assert not (killed / "_SUCCESS").exists()
    cluster.run("segment_bucket.py", *common, "--out", str(killed))
    assert masks(killed) == expected
    ids = pq.read_table(killed / "masks")["image_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 200

"""Masks as files: the whole job on a real cluster."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray_cluster import SEGMENT, Cluster, draw_pictures

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = draw_pictures(tmp_path_factory.mktemp("export") / "pictures", 12, seed=4)
    (folder / "sub").mkdir()
    for number, path in enumerate(sorted(folder.glob("*.png"))[:3]):
        path.rename(folder / "sub" / path.name)
        if number == 0:
            (folder / "sub" / path.with_suffix(".jpg").name).write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def masks(cluster: Cluster, model: Path, pictures: Path) -> Path:
    out = pictures.parent / "masks"
    flags = ["--model", str(model), "--out", str(out), *SEGMENT, "--predict.shard-batches", "1"]
    cluster.run("segment_bucket.py", "--input", f"{pictures}/", *flags)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_mask_is_a_file_where_its_picture_is(
    cluster: Cluster, masks: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = ["export_masks.py", "--masks", str(masks), "--out", str(out), "--overlays"]
    assert "labels of image size, overlays" in cluster.run(*job, "--dry-run").stdout
    assert not out.exists()
    cluster.run(*job)
    index = pq.read_table(out / "index").to_pylist()
    assert len(index) == 13
    written = {row["label"] for row in index if row["status"] == "ok"}
    assert len(written) == 12
    # Its neighbour of the same stem has no mask; both keep their suffix.
    assert "labels/sub/picture-000.png.png" in written
    for row in index:
        if row["status"] == "ok":
            with Image.open(row["image_uri"]) as picture, Image.open(out / row["label"]) as label:
                assert picture.size == label.size
            assert (out / row["overlay"]).stat().st_size > 100
    assert {str(p.relative_to(out)) for p in (out / "labels").rglob("*.png")} == written
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["counts"]["labels"]) == ("done", 12)

    # What a killed run had not done is done again, with the same bytes; the rest stays.
    expected, parts = files(out / "labels"), sorted((out / "index").iterdir())
    assert len(parts) > 1
    torn = next(row["label"] for row in pq.read_table(parts[0]).to_pylist() if row["label"])
    (out / torn).write_bytes(b"half a fi")
    parts[0].unlink()
    times = {path: path.stat().st_mtime_ns for path in parts[1:]}
    cluster.run(*job)
    assert files(out / "labels") == expected
    assert {path: path.stat().st_mtime_ns for path in parts[1:]} == times


def test_named_clusters_are_classes_and_other_names_another_export(
    cluster: Cluster, masks: Path, tmp_path: Path
) -> None:
    names, out = tmp_path / "names.toml", tmp_path / "out"
    names.write_text('0 = "things"\n1 = "things"\n2 = ""\n')
    job = ["export_masks.py", "--masks", str(masks), "--out", str(out), "--size", "stored"]
    cluster.run(*job, "--names", str(names))
    legend = json.loads((out / "legend.json").read_text())["classes"]
    classes = (out / "classes.txt").read_text().splitlines()
    assert [row["name"] for row in legend] == classes
    assert legend[0]["clusters"] == [0, 1]
    found = np.concatenate(
        [np.asarray(Image.open(path)).ravel() for path in (out / "labels").rglob("*.png")]
    )
    assert {*found.tolist()} <= {*range(len(classes)), 255}
    done = cluster.run(*job, check=2)
    assert "names" in done.stderr
    assert "--overwrite" in done.stderr
    cluster.run(*job, "--overwrite")
    assert len((out / "classes.txt").read_text().splitlines()) > len(classes)
    bad = tmp_path / "bad.toml"
    bad.write_text('99 = "sky"\n')
    done = cluster.run(*job, "--names", str(bad), check=2)
    assert "99: no cluster" in done.stderr
    report = ["report.py", "--masks", str(masks), "--names", str(names)]
    cluster.run(*report)
    assert "things" in (masks / "report" / "index.html").read_text()

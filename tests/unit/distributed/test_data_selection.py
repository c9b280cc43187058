"""Which images a job takes, what it says of them, and which views may be neighbours."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from factories import make_views, picture, png_bytes, write_neighbors, write_tree

from stego_core.config.compat import MineCompat
from stego_core.config.schema import (
    DataConfig,
    EvaluateJob,
    ImageLimits,
    NeighborsConfig,
    TrainJob,
    ViewConfig,
)
from stego_core.datasets.directory import open_dataset
from stego_core.distributed.data import check_data, plan_check, select_images
from stego_core.distributed.evaluate import _checked
from stego_core.distributed.fetch import SquareViews
from stego_core.distributed.mine import plan_mine
from stego_core.errors import InputError
from stego_core.images.geometry import resize_image, view_boxes
from stego_core.neighbors.table import read_table
from stego_core.storage.run import RunDirectory


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data"
    for number in range(6):
        write_tree(
            folder,
            {
                f"imgs/val/{number}.png": png_bytes(picture(20, 20, seed=number)),
                f"labels/val/{number}.png": png_bytes(np.zeros((20, 20), np.uint8)),
            },
        )
    return folder


def test_one_warning_and_one_event_tell_what_is_odd(root, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("stego_core"), "propagate", True)
    (root / "labels/val/1.png").unlink()
    (root / "labels/val/2.png").write_bytes(b"broken")
    data = DataConfig(root=str(root), split="val")
    dataset = open_dataset(str(root), "val")
    run = RunDirectory(str(tmp_path / "out"), job="test")
    with caplog.at_level(logging.WARNING, "stego_core"):
        check_data(run, data, dataset, select_images(data, dataset), ImageLimits())
    (record,) = caplog.records
    assert [line.split(":")[1] for line in record.getMessage().splitlines()] == [
        " 1 of 6 images have no label file",
        " 1 of 5 label files looked into can't be read and count as missing",
    ]
    (line,) = (tmp_path / "out/events.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert event["event"] == "data/check"
    assert (event["images"], event["labels"], event["pairs"]) == (6, 5, 5)
    assert [found["kind"] for found in event["findings"]] == [
        "images_without_label",
        "unreadable_label",
    ]


@pytest.mark.parametrize("classes", [None, b"sky\n"])
def test_values_without_class_names_are_one_line_in_log_event_and_plan(
    root, tmp_path, caplog, monkeypatch, classes
):
    monkeypatch.setattr(logging.getLogger("stego_core"), "propagate", True)
    if classes:
        write_tree(root, {"classes.txt": classes})
    data = DataConfig(root=str(root), split="val")
    dataset = open_dataset(str(root), "val")
    files = select_images(data, dataset)
    run = RunDirectory(str(tmp_path / "out"), job="test")
    with caplog.at_level(logging.INFO, "stego_core"):
        check_data(run, data, dataset, files, ImageLimits())
    event = json.loads((tmp_path / "out/events.jsonl").read_text())
    line = "label values beside 255: 0 to 0, 1 different, in 6 label files; no classes.txt"
    logged = [(record.levelname, record.getMessage()) for record in caplog.records]
    planned = plan_check(data, dataset, files, ImageLimits())
    if classes:
        assert (logged, event["values"], len(planned)) == ([], None, 1)
    else:
        assert logged == [("INFO", f"{line} to compare them with")]
        assert event["values"] == {"minimum": 0, "maximum": 0, "distinct": 1}
        assert planned[1:] == [f"{line} to compare them with"]


def test_evaluation_without_any_pair_is_refused_before_it_starts(root, tmp_path):
    for path in (root / "labels/val").iterdir():
        path.rename(path.with_name(f"other-{path.name}"))
    job = EvaluateJob(data=DataConfig(root=str(root), split="val"))
    with pytest.raises(InputError, match=r"none of the 6 images in .* has a label file"):
        _checked(job, RunDirectory(str(tmp_path / "out"), job="test"))


def test_a_plan_shows_the_chosen_images_and_what_is_odd(root, tmp_path):
    (root / "labels/val/0.png").unlink()
    data = DataConfig(root=str(root), split="val", limit=3)
    lines = plan_mine(TrainJob(out=str(tmp_path / "out"), data=data))
    assert any(f"{root}/imgs/val: 3, labels" in line for line in lines)
    assert "label files: 5, images with one: 2 of 3" in lines
    assert any(line.startswith("data: 1 of 3 images have no label file") for line in lines)


def test_random_views_are_cut_where_the_image_id_says():
    image, config = picture(40, 60), ViewConfig(resolution=16, crops="random", crop_ratio=0.5)
    views = SquareViews(config, side=16, compat=MineCompat())(image, 77)
    boxes = view_boxes(40, 60, crops="random", ratio=0.5, image_id=77)
    expected = np.stack([resize_image(image, 16, 16, box=box) for box in boxes])
    np.testing.assert_array_equal(views, expected)
    assert (SquareViews(config, side=16, compat=MineCompat())(image, 78) != expected).any()


@pytest.mark.parametrize("exclude_own", [True, False])
def test_crops_of_one_image_are_neighbours_only_if_they_may_be(exclude_own, tmp_path):
    views = make_views(6, crops=5, dim=8)
    # Crops of an image are nearly alike, so they come first wherever they are allowed.
    base = np.repeat(views.embeddings[::5], 5, axis=0)
    alike = base + 0.01 * views.embeddings
    views.embeddings[:] = alike / np.linalg.norm(alike, axis=1, keepdims=True)
    config = NeighborsConfig(stored=4, used=4, exclude_own=exclude_own)
    write_neighbors(tmp_path, views, config)
    table = read_table(str(tmp_path), key="k").to_pylist()
    assert len(table) == 30
    for row in table:
        pairs = list(zip(row["neighbor_ids"], row["neighbor_crops"], strict=True))
        assert len(pairs) == 4
        assert (row["image_id"], row["crop"]) not in pairs
        assert {image == row["image_id"] for image, _ in pairs} == {not exclude_own}

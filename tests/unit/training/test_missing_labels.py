"""Training goes on when labels are missing or damaged in any way; only the probe sees fewer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from factories import (
    FakeFeatures,
    FolderContext,
    make_views,
    png_bytes,
    random_maps,
    train_data,
    train_job,
    write_tree,
)

from stego_core.config.schema import ImageLimits, ViewConfig
from stego_core.datasets.directory import Dataset
from stego_core.storage import fs
from stego_core.training.loop import train
from stego_core.training.views import LabelSource

NUM = 8


def write_labels(root, damage):
    for number in range(NUM):
        label = np.random.default_rng(number).integers(0, 3, (40, 40), dtype=np.uint8)
        write_tree(root, {f"{number}.png": png_bytes(label)})
    damaged = {"all": range(NUM), "none": ()}.get(damage, (0, 3))
    for number in damaged:
        path = root / f"{number}.png"
        path.unlink()
        if damage == "broken":
            path.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
        elif damage == "a folder":
            path.mkdir()
        elif damage == "colours":
            path.write_bytes(png_bytes(np.zeros((40, 40, 3), np.uint8)))
        elif damage == "empty":
            path.touch()
        elif damage == "only 255":
            path.write_bytes(png_bytes(np.full((40, 40), 255, np.uint8)))
    return str(root)


def test_a_label_that_cant_be_read_for_the_moment_is_not_forgotten(tmp_path, monkeypatch):
    views = make_views(NUM)
    for number in range(NUM):
        label = png_bytes(np.full((40, 40), 5 if number == 3 else 1, np.uint8))
        fs.write_bytes(f"memory://label-tests/{number}.png", label)
    paths = {int(i): f"{number}.jpg" for number, i in enumerate(views.image_ids)}
    source = LabelSource(
        Dataset("nowhere", "memory://label-tests"),
        views,
        paths,
        config=ViewConfig(resolution=40),
        limits=ImageLimits(),
    )
    read = fs.read_if_exists

    def fail(uri):
        if uri.endswith("3.png"):
            raise OSError("AWS Error SLOW_DOWN during GetObject operation")
        return read(uri)

    monkeypatch.setattr(fs, "read_if_exists", fail)
    assert source.num_classes() == 2  # labels are not worth a training
    assert (source.read_maps(np.array([3]), 40) == 255).all()
    monkeypatch.undo()
    assert (source.read_maps(np.array([3]), 40) == 5).all()
    assert source.num_classes() == 6
    fs.delete("memory://label-tests")


@pytest.mark.parametrize(
    "damage", ["none", "missing", "broken", "a folder", "colours", "empty", "only 255", "all"]
)
def test_training_goes_on_whatever_happened_to_label_files(damage, tmp_path):
    dataset = Dataset("nowhere", write_labels(tmp_path / "labels", damage))
    views = make_views(NUM)
    paths = {int(i): f"{number}.jpg" for number, i in enumerate(views.image_ids)}
    config = ViewConfig(resolution=40)
    labels = LabelSource(dataset, views, paths, config=config, limits=ImageLimits())
    num_classes = labels.num_classes()
    assert num_classes == (0 if damage == "all" else 3)
    data = train_data(
        NUM,
        features=FakeFeatures(random_maps(NUM)),
        labels=labels if num_classes else None,
        num_classes=num_classes,
    )
    context = FolderContext(tmp_path / "run")
    train(train_job(), data, context, device="cpu")
    steps = [event for event in context.events if event["event"] == "train/step"]
    assert len(steps) == 6
    for step in steps:
        numbers = [value for value in step.values() if isinstance(value, float)]
        assert all(math.isfinite(number) for number in numbers), step


def test_what_16_bits_say_beyond_8_is_ignored(tmp_path):
    label = np.array([[0, 2], [255, 256]], np.uint16).repeat(20, 0).repeat(20, 1)
    label[0] = 65535
    root = write_tree(tmp_path, {"0.png": png_bytes(label)})
    views = make_views(1)
    labels = LabelSource(
        Dataset("nowhere", str(root)),
        views,
        {int(views.image_ids[0]): "0.jpg"},
        config=ViewConfig(resolution=40),
        limits=ImageLimits(),
    )
    assert labels.num_classes() == 3
    found = labels.read_maps(np.array([0]), 40)
    assert found.unique().tolist() == [0, 2, 255]
    assert (found[0, 20:] == 255).all()

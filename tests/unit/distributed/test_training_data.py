"""What a training finds in the run directory: stored features, and the classes of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from factories import (
    FakeFeatures,
    make_views,
    png_bytes,
    random_maps,
    train_data,
    train_job,
    write_tree,
)

from stego_core.config.schema import ImageLimits, MineJob, TrainJob, ViewConfig
from stego_core.datasets.directory import Dataset
from stego_core.distributed.mine import Mined
from stego_core.distributed.training_data import _num_classes, local_features
from stego_core.distributed.tune_trial import _Context
from stego_core.errors import SchemaError
from stego_core.model.weights import ResolvedWeights
from stego_core.storage.feature_store import SCHEMA, read_views, write_unit
from stego_core.storage.manifest import list_images, write_manifest
from stego_core.training.loop import LocalContext, train
from stego_core.training.views import LabelSource

NUM = 9


def test_views_do_not_read_each_others_features_where_a_file_is_lost(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "in", {f"{n}.png": b"x" for n in range(2)})
    manifest = write_manifest(str(tmp_path / "m"), list_images(str(root)), unit_images=1)
    store = tmp_path / "store"
    for unit, image_id in enumerate(manifest.read(["image_id"])["image_id"].to_pylist()):
        row = dict.fromkeys(SCHEMA.names) | {"image_id": image_id, "crop": 0, "status": "ok"}
        table = pa.Table.from_pylist([row | {"embedding": [1.0, 0.0]}], SCHEMA)
        write_unit(str(store), unit, table, np.zeros((1, 1, 1, 2)))
    weights, data = ResolvedWeights(None, "random", "0"), Dataset(str(root), None)
    mined = Mined(data, manifest, str(store), True, "key", weights, MineJob().backbone)
    views = read_views(str(store), manifest.num_units)
    local_features(TrainJob(), mined, views, device="cpu")
    (store / "unit-00000000.npy").unlink()
    with pytest.raises(SchemaError, match="features of 1 of 2 views: delete it, and mine again"):
        local_features(TrainJob(), mined, views, device="cpu")


def test_a_training_that_goes_on_keeps_its_number_of_classes(tmp_path: Path) -> None:
    files = {f"{n}.png": png_bytes(np.full((20, 20), n % 6, np.uint8)) for n in range(NUM)}
    root, views = write_tree(tmp_path / "labels", files), make_views(NUM)
    paths = {int(i): f"{number}.jpg" for number, i in enumerate(views.image_ids)}
    labels = LabelSource(
        Dataset("nowhere", str(root)),
        views,
        paths,
        config=ViewConfig(resolution=40),
        limits=ImageLimits(),
    )
    found = _num_classes(labels, LocalContext())
    assert found == labels.num_classes() == 6
    context = _Context(str(tmp_path / "state"))
    data = train_data(
        NUM, features=FakeFeatures(random_maps(NUM)), labels=labels, num_classes=found
    )
    train(train_job(), data, context, device="cpu")
    for path in root.iterdir():
        path.write_bytes(png_bytes(np.zeros((20, 20), np.uint8)))
    fresh = LabelSource(
        Dataset("nowhere", str(root)),
        views,
        paths,
        config=ViewConfig(resolution=40),
        limits=ImageLimits(),
    )
    assert fresh.num_classes() == 1
    assert _num_classes(fresh, context) == found

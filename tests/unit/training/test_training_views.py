from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from factories import make_views, picture, png_bytes, train_data, train_job, write_tree
from PIL import Image

from stego_core.config.compat import MineCompat
from stego_core.config.schema import BackboneConfig, ImageLimits, ViewConfig
from stego_core.datasets.directory import Dataset, open_dataset
from stego_core.errors import InputError
from stego_core.images.geometry import resize_image, resize_labels, view_boxes
from stego_core.model.backbone import load_backbone
from stego_core.storage.feature_store import SCHEMA, StoredFeatures, write_unit
from stego_core.training import views as views_module
from stego_core.training.loop import LocalContext, train
from stego_core.training.views import FromBackbone, FromStore, LabelSource, view_side

LIMITS = ImageLimits()
PLAIN = MineCompat()
FIVE = ViewConfig(resolution=32, crops="five", crop_ratio=0.6)
WHOLE = ViewConfig(resolution=32, crops="whole")


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(BackboneConfig(name="test_vit", weights="random", precision="fp32"))


def uris_of(folder, views, *, size=(40, 60)):
    """One picture for each image id of the views; returns its URI by id."""
    uris = {}
    for number, image_id in enumerate(dict.fromkeys(views.image_ids.tolist())):
        data = png_bytes(picture(*size, seed=number))
        write_tree(folder, {f"{image_id}.png": data})
        uris[image_id] = str(folder / f"{image_id}.png")
    return uris


def test_features_come_from_the_store_as_from_the_backbone_to_the_last_bit(backbone, tmp_path):
    views = make_views(2, crops=5)
    uris = uris_of(tmp_path / "images", views)
    on_demand = FromBackbone(backbone, views, uris, config=FIVE, limits=LIMITS, compat=PLAIN)
    maps = on_demand.read(np.arange(10))
    rows = {
        "image_id": views.image_ids,
        "crop": views.crops,
        "status": ["ok"] * 10,
        "detail": pa.nulls(10, pa.string()),
        "embedding": [[0.0]] * 10,
        "class_token": [None] * 10,
    }
    write_unit(
        str(tmp_path / "store"), 0, pa.table(rows, schema=SCHEMA), maps.permute(0, 2, 3, 1).numpy()
    )
    stored = FromStore(StoredFeatures(str(tmp_path / "store"), 1))
    order = np.array([7, 0, 3])
    assert stored.read(order).shape == (3, backbone.width, 2, 2)
    # Both are rounded to fp16; one forward of three images may differ from one of ten in its last
    # bits, and so by one unit of fp16.
    torch.testing.assert_close(stored.read(order), on_demand.read(order), rtol=2e-3, atol=1e-4)
    assert torch.equal(stored.read(np.arange(10)), maps)
    assert torch.equal(maps, maps.half().float())


def test_a_view_shows_its_crop_of_its_image(backbone, tmp_path):
    views = make_views(2, crops=5)
    uris = uris_of(tmp_path, views)
    source = FromBackbone(backbone, views, uris, config=FIVE, limits=LIMITS, compat=PLAIN)
    with Image.open(uris[int(views.image_ids[8])]) as image:
        pixels = np.asarray(image.convert("RGB"))
    box = view_boxes(40, 60, crops="five", ratio=0.6)[3]
    cut = torch.from_numpy(resize_image(pixels, 32, 32, box=box))[None]
    expected = backbone(backbone.prepare(cut)).half().float()
    torch.testing.assert_close(source.read(np.array([8])), expected, rtol=2e-3, atol=1e-4)
    other = source.read(np.array([7]))
    assert not torch.allclose(other, expected, rtol=2e-3, atol=1e-3)


def test_stored_features_lie_channels_last(backbone, tmp_path):
    maps = np.zeros((1, 2, 2, 3), np.float16)
    rows = {
        "image_id": [1],
        "crop": [0],
        "status": ["ok"],
        "detail": [None],
        "embedding": [[0.0]],
        "class_token": [None],
    }
    write_unit(str(tmp_path), 0, pa.table(rows, schema=SCHEMA), maps)
    read = FromStore(StoredFeatures(str(tmp_path), 1)).read(np.array([0, 0]))
    assert read.is_contiguous(memory_format=torch.channels_last)


def test_an_image_that_changed_since_mining_is_named(backbone, tmp_path):
    views = make_views(1)
    uris = uris_of(tmp_path, views)
    (uri,) = uris.values()
    source = FromBackbone(backbone, views, uris, config=WHOLE, limits=LIMITS, compat=PLAIN)
    Path(uri).write_bytes(b"not an image any more")
    with pytest.raises(InputError, match=r"has changed since mining .*: mine again"):
        source.read(np.array([0]))
    Path(uri).unlink()
    with pytest.raises(InputError, match="is gone since mining: mine again"):
        source.read(np.array([0]))


@pytest.mark.parametrize(
    ("resolution", "patch", "side"), [(224, 14, 224), (225, 14, 238), (1, 16, 16)]
)
def test_the_side_of_a_view_is_rounded_up_to_whole_patches(resolution, patch, side):
    assert view_side(ViewConfig(resolution=resolution), patch) == side


def label_map(height=30, width=50, *, seed=0):
    blocks = np.random.default_rng(seed).integers(0, 7, (height // 5, width // 5))
    return np.kron(blocks, np.ones((5, 5))).astype(np.uint8)


@pytest.fixture
def labelled(tmp_path):
    """Three images: labels; labels in a sub-folder and another format of image; none."""
    names = ["a.jpg", "sub/b.png", "c.jpg"]
    write_tree(
        tmp_path,
        {
            **{f"imgs/train/{name}": b"never opened here" for name in names},
            "labels/train/a.png": png_bytes(label_map(seed=1)),
            "labels/train/sub/b.png": png_bytes(label_map(20, 20, seed=2)),
        },
    )
    return open_dataset(str(tmp_path), "train"), names


def source_of(labelled, *, config=FIVE):
    dataset, names = labelled
    views = make_views(3, crops=1 if config.crops == "whole" else 5)
    ids = list(dict.fromkeys(views.image_ids.tolist()))
    return LabelSource(
        dataset, views, dict(zip(ids, names, strict=True)), config=config, limits=LIMITS
    )


def drawn(views, pixels=200, *, seed=0):
    return torch.rand(len(views), pixels, 2, generator=torch.Generator().manual_seed(seed))


def test_labels_are_those_of_the_resized_label_map_at_the_drawn_pixels(labelled):
    views, side = np.array([0, 3, 9, 5]), 32
    pixels = drawn(views)
    labels, points = source_of(labelled).read(views, pixels, side)
    maps = [label_map(seed=1), label_map(20, 20, seed=2)]
    for row, view in enumerate(views):
        whole = maps[view // 5]
        box = view_boxes(*whole.shape, crops="five", ratio=0.6)[view % 5]
        shown = resize_labels(whole, side, side, box=box)
        columns, lines = ((pixels[row] * side).long()[:, axis].numpy() for axis in (0, 1))
        np.testing.assert_array_equal(labels[row].numpy(), shown[lines, columns])
        expected = np.stack([(2 * columns + 1) / side - 1, (2 * lines + 1) / side - 1], -1)
        np.testing.assert_allclose(points[row].numpy(), expected, atol=1e-6)
    assert len(labels.unique()) > 3


def test_the_points_lead_grid_sample_to_the_labels(labelled):
    source = source_of(labelled, config=WHOLE)
    views, side = np.array([0]), 32
    labels, points = source.read(views, drawn(views), side)
    whole = label_map(seed=1)
    shown = resize_labels(
        whole, side, side, box=view_boxes(*whole.shape, crops="whole", ratio=1)[0]
    )
    sampled = torch.nn.functional.grid_sample(
        torch.from_numpy(shown)[None, None].float(), points[:, None], align_corners=False
    )
    torch.testing.assert_close(sampled[0, 0], labels.float(), atol=1e-3, rtol=0)


def test_whole_label_maps_are_the_resized_crops_and_255_without_labels(labelled):
    maps = source_of(labelled).read_maps(np.array([3, 9, 10]), 32)
    assert maps.shape == (3, 32, 32)
    assert maps.dtype == torch.int64
    for row, whole in enumerate([label_map(seed=1), label_map(20, 20, seed=2)]):
        box = view_boxes(*whole.shape, crops="five", ratio=0.6)[(3, 4)[row]]
        expected = resize_labels(whole, 32, 32, box=box)
        np.testing.assert_array_equal(maps[row].numpy(), expected)
    assert (maps[2] == 255).all()


def test_an_image_without_a_label_file_is_ignored_everywhere(labelled):
    labels, _ = source_of(labelled).read(np.array([10, 14, 0]), drawn([0, 0, 0]), 32)
    assert (labels[:2] == 255).all()
    assert (labels[2] != 255).any()


def test_a_label_file_that_can_not_be_read_is_ignored_everywhere(labelled):
    dataset, _ = labelled
    Path(dataset.labels_uri, "a.png").write_bytes(b"broken")
    source = source_of(labelled)
    assert (source.read(np.array([0]), drawn([0]), 32)[0] == 255).all()
    assert source.num_classes() == label_map(20, 20, seed=2).max() + 1


def test_the_number_of_classes_is_the_largest_label_plus_one_without_255(labelled, tmp_path):
    found = max(label_map(seed=1).max(), label_map(20, 20, seed=2).max()) + 1
    assert source_of(labelled).num_classes() == found
    with_holes = label_map(seed=1)
    with_holes[:10], with_holes[10, 10] = 255, 11
    write_tree(tmp_path, {"labels/train/a.png": png_bytes(with_holes)})
    assert source_of(labelled).num_classes() == 12


def test_without_any_label_file_there_are_no_classes(tmp_path):
    write_tree(tmp_path, {"labels/readme.txt": b""})
    empty = Dataset(images_uri=str(tmp_path), labels_uri=str(tmp_path / "labels"))
    source = source_of((empty, ["a.jpg", "b.jpg", "c.jpg"]))
    assert source.num_classes() == 0


def test_a_small_cache_gives_the_same_labels(labelled, monkeypatch):
    views = np.array([0, 5, 10, 1, 6, 0])
    expected, _ = source_of(labelled).read(views, drawn(views), 32)
    monkeypatch.setattr(views_module, "_LABEL_CACHE_BYTES", 500)
    source = source_of(labelled)
    for _ in range(2):
        assert torch.equal(source.read(views, drawn(views), 32)[0], expected)
    assert source._cached_bytes <= 500


def test_pixels_at_the_edges_stay_inside(labelled):
    edges = torch.tensor([[[0.0, 0.0], [1.0 - 2**-24, 1.0 - 2**-24]]])
    labels, points = source_of(labelled).read(np.array([0]), edges, 31)
    assert labels.shape == (1, 2)
    assert points.abs().max() < 1


def test_random_views_and_their_labels_show_the_same_places(backbone, labelled, tmp_path):
    config = ViewConfig(resolution=32, crops="random", crop_ratio=0.6)
    source, view = source_of(labelled, config=config), 3
    image_id = int(source._views.image_ids[view])
    whole = label_map(seed=1)
    box = view_boxes(*whole.shape, crops="random", ratio=0.6, image_id=image_id)[view]
    shown = resize_labels(whole, 32, 32, box=box)
    np.testing.assert_array_equal(source._view_labels(view, 32), shown)
    views = make_views(1, crops=5)
    uris = uris_of(tmp_path / "images", views)
    on_demand = FromBackbone(backbone, views, uris, config=config, limits=LIMITS, compat=PLAIN)
    box = view_boxes(40, 60, crops="random", ratio=0.6, image_id=int(views.image_ids[0]))[view]
    expected = resize_image(picture(40, 60, seed=0), 32, 32, box=box)
    np.testing.assert_array_equal(on_demand.pixels(np.array([view]))[0], expected)


def test_training_with_the_store_and_without_it_gives_the_same_head(backbone, tmp_path):
    views = make_views(9)
    uris = uris_of(tmp_path / "images", views)
    on_demand = FromBackbone(backbone, views, uris, config=WHOLE, limits=LIMITS, compat=PLAIN)
    # As mining does it: in batches of other views than training will ask for together.
    maps = torch.cat([on_demand.read(np.arange(i, min(i + 4, 9))) for i in range(0, 9, 4)])
    rows = {
        "image_id": views.image_ids,
        "crop": views.crops,
        "status": ["ok"] * 9,
        "detail": pa.nulls(9, pa.string()),
        "embedding": [[0.0]] * 9,
        "class_token": [None] * 9,
    }
    folder = str(tmp_path / "store")
    write_unit(folder, 0, pa.table(rows, schema=SCHEMA), maps.permute(0, 2, 3, 1).numpy())
    job = train_job(train={"steps": 6, "batch": 4})
    heads = [
        train(
            job,
            replace(train_data(9), features=source, channels=backbone.width),
            LocalContext(),
            device="cpu",
        ).state_dict()
        for source in (FromStore(StoredFeatures(folder, 1)), on_demand)
    ]
    assert heads[0].keys() == heads[1].keys()
    for key, tensor in heads[0].items():
        # Features differ by at most a unit of fp16 in a few values; a step moves a weight by 1e-3
        # or less, whatever the size of its gradient.
        torch.testing.assert_close(tensor, heads[1][key], rtol=1e-2, atol=1e-4, msg=key)

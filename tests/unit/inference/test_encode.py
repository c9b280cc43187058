from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from factories import picture, train_job

from stego_core.config.schema import BackboneConfig, LabelMapConfig
from stego_core.inference import encode
from stego_core.inference.encode import encode_code, encode_images
from stego_core.model.backbone import load_backbone
from stego_core.model.head import Head
from stego_core.model.segmenter import Segmenter


@pytest.fixture(scope="module")
def segmenter():
    backbone = load_backbone(BackboneConfig(name="test_vit", weights="random", precision="fp32"))
    job = train_job(head={"whiten": 0, "smooth": 0.0})
    torch.manual_seed(0)
    head = Head(backbone.width, job.head)
    tensors = {f"head.{key}": value for key, value in head.state_dict().items()}
    tensors |= {"clusters": torch.randn(4, 6)}
    return Segmenter(backbone, tensors, {"head": asdict(job.head)})


class Local:
    """A model whose code of a patch is the patch's mean colour: nothing outside has influence."""

    def __init__(self, patch=4):
        self.backbone = type("Backbone", (), {"patch_size": patch})
        self.shapes = []

    def encode(self, pixels, *, flip=False):
        self.shapes.append(tuple(pixels.shape[:3]))
        images = pixels.permute(0, 3, 1, 2).float()
        means = torch.nn.functional.avg_pool2d(images, self.backbone.patch_size)
        return means, means[:, :2] + 1000 * flip


def batch(height, width, count=1):
    return torch.from_numpy(np.stack([picture(height, width, seed=s) for s in range(count)]))


def both(model, pixels, *, flip=False, **settings):
    return encode_images(model, pixels, LabelMapConfig(**settings), flip=flip)


def test_an_image_no_larger_than_a_tile_is_encoded_in_one_piece(segmenter):
    patch = segmenter.backbone.patch_size
    pixels = batch(2 * patch, 3 * patch, 2)
    for found, expected in zip(both(segmenter, pixels), segmenter.encode(pixels), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (44, 44), (4, 200)])
def test_tiles_of_a_local_model_leave_no_seam(height, width):
    model, pixels = Local(), batch(height, width, 2)
    features, code = both(model, pixels, tile=40, flip=True)
    expected = model.encode(pixels, flip=True)
    torch.testing.assert_close(features, expected[0], atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(code, expected[1], atol=1e-3, rtol=1e-5)
    assert max(max(shape[1:]) for shape in model.shapes[:-1]) <= 40


def test_a_constant_image_has_a_smooth_code_across_tiles(segmenter):
    patch = segmenter.backbone.patch_size
    side = 8
    pixels = torch.full((1, side * patch, 30 * patch, 3), 90, dtype=torch.uint8)
    _, code = both(segmenter, pixels, tile=side * patch)
    _, one = both(segmenter, pixels[:, :, : side * patch], tile=side * patch)
    steps = (code[..., 1:] - code[..., :-1]).norm(dim=1)
    inside = (one[..., 1:] - one[..., :-1]).norm(dim=1)
    # Blending adds no step that the network doesn't make inside a tile by itself.
    assert steps.max() <= inside.max() * 1.01


def test_tiled_and_whole_codes_agree_where_the_network_sees_the_same(segmenter):
    patch = segmenter.backbone.patch_size
    pixels = batch(6 * patch, 20 * patch)
    _, whole = segmenter.encode(pixels)
    _, tiled = both(segmenter, pixels, tile=12 * patch)
    assert tiled.shape == whole.shape
    cosine = torch.cosine_similarity(whole, tiled, dim=1)
    assert cosine.mean() > 0.9


def test_the_batch_and_the_pass_change_nothing(segmenter, monkeypatch):
    patch = segmenter.backbone.patch_size
    pixels = batch(5 * patch, 12 * patch, 3)
    _, together = both(segmenter, pixels, tile=5 * patch)
    for number in range(3):
        _, alone = both(segmenter, pixels[number : number + 1], tile=5 * patch)
        assert torch.equal(alone[0], together[number])
    monkeypatch.setattr(encode, "_PASS_PIXELS", 1)
    _, one_by_one = both(segmenter, pixels, tile=5 * patch)
    torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=1e-4)


def test_the_code_alone_is_that_of_both(segmenter):
    patch = segmenter.backbone.patch_size
    pixels, config = batch(4 * patch, 9 * patch), LabelMapConfig(tile=4 * patch, scales=(0.5, 1.0))
    _, expected = encode_images(segmenter, pixels, config, flip=True)
    assert torch.equal(encode_code(segmenter, pixels, config, flip=True), expected)


def test_a_tile_smaller_than_a_patch_still_covers_the_image(segmenter):
    patch = segmenter.backbone.patch_size
    assert both(segmenter, batch(2 * patch, 3 * patch), tile=1)[1].shape[2:] == (2, 3)


def test_scales_are_averaged_on_the_grid_of_scale_one():
    model, pixels = Local(), torch.full((1, 40, 60, 3), 77, dtype=torch.uint8)
    features, code = both(model, pixels, scales=(0.5, 1.0, 1.25))
    assert [shape[1:] for shape in model.shapes] == [(20, 32), (40, 60), (48, 76)]
    assert features.shape == (1, 3, 10, 15)
    torch.testing.assert_close(code, torch.full((1, 2, 10, 15), 77.0))


def test_one_scale_other_than_one_sees_another_size_and_keeps_the_grid(segmenter):
    patch = segmenter.backbone.patch_size
    pixels = batch(4 * patch, 6 * patch)
    _, half = both(segmenter, pixels, scales=(0.5,))
    _, mean = both(segmenter, pixels, scales=(0.5, 1.0))
    _, plain = both(segmenter, pixels)
    torch.testing.assert_close(mean, (half + plain) / 2)
    assert not torch.allclose(half, plain, atol=1e-3)

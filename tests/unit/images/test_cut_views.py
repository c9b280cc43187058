from __future__ import annotations

import io

import numpy as np
import pytest
from factories import picture
from PIL import Image

from stego_core.config.compat import MineCompat
from stego_core.config.schema import ViewConfig
from stego_core.images.geometry import five_crop_boxes, random_crop_boxes, resize_image, view_boxes
from stego_core.images.views import cut_view, view_count

FIVE = ViewConfig(crops="five", crop_ratio=0.6)
RANDOM = ViewConfig(crops="random", crop_ratio=0.6)
WHOLE = ViewConfig(crops="whole")
PLAIN = MineCompat()


@pytest.mark.parametrize("config", [FIVE, RANDOM, WHOLE], ids=["five", "random", "whole"])
def test_a_view_is_its_box_resized(config):
    image = picture(40, 61)
    boxes = view_boxes(40, 61, crops=config.crops, ratio=config.crop_ratio, image_id=7)
    assert view_count(config) == len(boxes)
    for crop, box in enumerate(boxes):
        expected = resize_image(image, 16, 16, box=box)
        found = cut_view(image, 7, crop, 16, config, PLAIN)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("config", [FIVE, WHOLE], ids=["five", "whole"])
def test_with_nearest_images_every_pixel_of_a_view_is_a_pixel_of_the_image(config):
    # Colours that occur once in the image: a blend of two is none of them.
    index = np.arange(40 * 60)
    image = np.stack([index % 256, index // 256, 7 * index % 256], -1).astype(np.uint8)
    image = image.reshape(40, 60, 3)
    colours = {tuple(colour) for colour in image.reshape(-1, 3).tolist()}
    nearest = cut_view(image, 7, 0, 16, config, MineCompat(nearest_images=True))
    assert {tuple(colour) for colour in nearest.reshape(-1, 3).tolist()} <= colours
    smooth = cut_view(image, 7, 0, 16, config, PLAIN)
    assert not {tuple(colour) for colour in smooth.reshape(-1, 3).tolist()} <= colours


def test_nearest_takes_the_pixel_under_the_centre():
    image = picture(9, 9)
    found = resize_image(image, 3, 3, nearest=True)
    np.testing.assert_array_equal(found, image[1::3, 1::3])


@pytest.mark.parametrize(
    ("config", "boxes"),
    [(FIVE, five_crop_boxes(40, 61, 0.6)), (RANDOM, random_crop_boxes(40, 61, 0.6, 7))],
    ids=["five", "random"],
)
def test_with_jpeg_crops_a_crop_is_compressed_before_it_is_made_square(config, boxes):
    image, compat = picture(40, 61), MineCompat(jpeg_crops=True)
    for crop, (top, left, height, width) in enumerate(boxes):
        buffer = io.BytesIO()
        cut = Image.fromarray(np.ascontiguousarray(image[top : top + height, left : left + width]))
        cut.save(buffer, "JPEG", quality=75)
        decoded = np.array(Image.open(buffer))
        # 24 x 36 pixels: the square starts at column 6.
        expected = resize_image(np.ascontiguousarray(decoded[:, 6:30]), 16, 16)
        found = cut_view(image, 7, crop, 16, config, compat)
        np.testing.assert_array_equal(found, expected)
        assert not np.array_equal(found, cut_view(image, 7, crop, 16, config, PLAIN))


def test_whole_views_are_never_compressed():
    image = picture(40, 61)
    views = [cut_view(image, 7, 0, 16, WHOLE, MineCompat(jpeg_crops=on)) for on in (False, True)]
    np.testing.assert_array_equal(*views)

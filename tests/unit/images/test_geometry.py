"""Boxes, grids and resizing against worked examples and slow references."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from stego_core.errors import ShapeError
from stego_core.images.geometry import (
    Box,
    centre_square,
    fit_grid,
    five_crop_boxes,
    random_crop_boxes,
    resize_image,
    resize_labels,
    view_boxes,
)

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (30, 44, 3), dtype=np.uint8)
LABELS = RNG.integers(0, 2**16, (30, 44), dtype=np.uint16)


def test_five_crops_of_the_golden_example():
    boxes = five_crop_boxes(5, 7, 0.5)
    assert boxes == [
        Box(0, 0, 2, 3),
        Box(0, 4, 2, 3),
        Box(3, 0, 2, 3),
        Box(3, 4, 2, 3),
        Box(2, 2, 2, 3),
    ]


def test_half_a_pixel_of_a_centre_is_rounded_to_even():
    # (9 - 4) / 2 = 2.5 goes to 2 and (7 - 4) / 2 = 1.5 to 2.
    assert five_crop_boxes(9, 9, 0.5)[4] == Box(2, 2, 4, 4)
    assert centre_square(Box(0, 0, 4, 9)) == Box(0, 2, 4, 4)
    assert centre_square(Box(0, 0, 7, 4)) == Box(2, 0, 4, 4)


def test_a_crop_of_less_than_a_pixel_becomes_one_pixel():
    assert five_crop_boxes(1, 10, 0.5) == [
        Box(0, 0, 1, 5),
        Box(0, 5, 1, 5),
        Box(0, 0, 1, 5),
        Box(0, 5, 1, 5),
        Box(0, 2, 1, 5),
    ]


def test_a_centre_square_stays_in_the_middle_of_its_own_box():
    assert centre_square(Box(10, 20, 4, 8)) == Box(10, 22, 4, 4)
    assert centre_square(Box(10, 20, 8, 4)) == Box(12, 20, 4, 4)
    assert centre_square(Box(3, 5, 6, 6)) == Box(3, 5, 6, 6)


def test_the_whole_view_is_the_centre_square_of_the_image():
    # Cityscapes: of 1024 x 2048 only the middle 1024 x 1024 is seen.
    assert view_boxes(1024, 2048, crops="whole", ratio=0.5) == [Box(0, 512, 1024, 1024)]


def test_five_views_are_the_centre_squares_of_the_five_crops():
    assert view_boxes(1024, 2048, crops="five", ratio=0.5) == [
        Box(0, 256, 512, 512),
        Box(0, 1280, 512, 512),
        Box(512, 256, 512, 512),
        Box(512, 1280, 512, 512),
        Box(256, 768, 512, 512),
    ]


@pytest.mark.parametrize(
    ("size", "resolution", "patch", "grid"),
    [
        ((500, 500), 224, 14, (16, 16)),
        ((500, 500), 320, 8, (40, 40)),
        ((1024, 2048), 320, 8, (28, 56)),  # 28 · 56 = 1568 of 1600, shape exact
        ((2048, 1024), 320, 8, (56, 28)),
        ((480, 640), 224, 14, (14, 18)),
        ((1, 10_000), 224, 14, (1, 256)),
        ((10_000, 1), 224, 14, (256, 1)),
        ((300, 400), 14, 14, (1, 1)),
        ((300, 400), 10, 14, (1, 1)),
    ],
)
def test_grids_of_known_sizes(size, resolution, patch, grid):
    assert fit_grid(*size, resolution=resolution, patch=patch) == grid


def test_resizing_to_the_same_size_changes_nothing():
    full = Box(0, 0, 30, 44)
    for box in (None, full):
        np.testing.assert_array_equal(resize_image(PIXELS, 30, 44, box=box), PIXELS)
        np.testing.assert_array_equal(resize_labels(LABELS, 30, 44, box=box), LABELS)


def test_results_do_not_share_memory_with_the_input():
    assert not np.shares_memory(resize_image(PIXELS, 30, 44), PIXELS)
    assert not np.shares_memory(resize_labels(LABELS, 30, 44), LABELS)


def test_a_box_is_cut_out_before_resizing():
    box = Box(3, 5, 20, 10)
    cut = PIXELS[3:23, 5:15].copy()
    np.testing.assert_array_equal(resize_image(PIXELS, 20, 10, box=box), cut)
    np.testing.assert_array_equal(resize_image(PIXELS, 7, 9, box=box), resize_image(cut, 7, 9))
    outside_changed = np.full_like(PIXELS, 255)
    outside_changed[3:23, 5:15] = cut
    np.testing.assert_array_equal(
        resize_image(outside_changed, 7, 9, box=box), resize_image(PIXELS, 7, 9, box=box)
    )


def test_shrinking_an_image_averages_instead_of_picking():
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 200
    small = resize_image(stripes, 8, 8)
    assert np.abs(small.astype(int) - 100).max() <= 30  # edges see fewer stripes
    assert np.abs(small[:, 2:-2].astype(int) - 100).max() <= 1


def test_images_come_out_as_contiguous_rgb_bytes():
    small = resize_image(PIXELS[:, ::-1], 11, 13)
    assert small.dtype == np.uint8
    assert small.shape == (11, 13, 3)
    assert small.flags.c_contiguous


@pytest.mark.parametrize(("height", "width"), [(30, 44), (15, 22), (60, 88), (7, 100), (1, 1)])
def test_each_label_pixel_takes_the_label_under_its_exact_centre(height, width):
    box = Box(2, 3, 25, 31)
    resized = resize_labels(LABELS, height, width, box=box)
    for row in range(height):
        for column in range(width):
            source_row = int((row + Fraction(1, 2)) * box.height / height)
            source_column = int((column + Fraction(1, 2)) * box.width / width)
            expected = LABELS[box.top + source_row, box.left + source_column]
            assert resized[row, column] == expected


@pytest.mark.parametrize(("height", "width"), [(15, 11), (60, 88), (90, 132), (1, 1)])
def test_labels_are_resized_as_pillow_does_nearest(height, width):
    labels = LABELS.astype(np.uint8)
    pillow = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(resize_labels(labels, height, width), np.asarray(pillow))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_keep_their_type_and_gain_no_value(dtype):
    labels = np.array([[0, 200], [7, 255]], dtype)
    resized = resize_labels(labels, 9, 5)
    assert resized.dtype == dtype
    assert resized.flags.c_contiguous
    assert set(np.unique(resized)) <= {0, 7, 200, 255}


def centre_of_mass(weights):
    rows, columns = np.indices(weights.shape) + 0.5
    total = weights.sum()
    return np.array([(rows * weights).sum(), (columns * weights).sum()]) / total


@pytest.mark.parametrize(("height", "width"), [(40, 40), (53, 71), (160, 240), (320, 200)])
def test_a_region_lies_at_the_same_place_in_image_and_labels(height, width):
    labels = np.zeros((160, 240), np.uint8)
    labels[37:80, 101:170] = 1
    box = Box(11, 60, 120, 130)
    pixels = np.repeat(labels[..., None] * np.uint8(255), 3, axis=2)
    from_image = centre_of_mass(resize_image(pixels, height, width, box=box)[..., 0] / 255)
    from_labels = centre_of_mass(resize_labels(labels, height, width, box=box))
    scale = np.array([height / box.height, width / box.width])
    expected = (np.array([(37 + 80) / 2 - box.top, (101 + 170) / 2 - box.left])) * scale
    # Nearest moves each edge by at most half a pixel of the coarser of the two grids.
    tolerance = 0.5 * np.maximum(1, scale)
    assert np.all(np.abs(from_image - expected) <= 0.1 * np.maximum(1, scale))
    assert np.all(np.abs(from_labels - expected) <= tolerance)


@pytest.mark.parametrize(
    "box",
    [Box(-1, 0, 5, 5), Box(0, -1, 5, 5), Box(0, 0, 31, 5), Box(0, 40, 5, 5), Box(0, 0, 0, 5)],
)
def test_a_box_outside_the_image_is_an_error(box):
    with pytest.raises(ShapeError, match="not inside an image of 30 x 44"):
        resize_image(PIXELS, 4, 4, box=box)
    with pytest.raises(ShapeError, match="not inside an image of 30 x 44"):
        resize_labels(LABELS, 4, 4, box=box)


def test_arrays_of_the_wrong_rank_are_errors():
    with pytest.raises(ShapeError, match=r"an image is \(H, W, 3\)"):
        resize_image(PIXELS[..., 0], 4, 4)
    with pytest.raises(ShapeError, match=r"a label map is \(H, W\)"):
        resize_labels(PIXELS, 4, 4)


def test_random_crops_are_the_same_in_every_process_and_differ_between_images():
    # Computed once with fractions; Python's own hash would change from process to process.
    boxes = random_crop_boxes(100, 200, 0.5, 7)
    expected = [(44, 96), (33, 26), (25, 25), (10, 83), (34, 88)]
    assert [(box.top, box.left) for box in boxes] == expected
    assert len(set(boxes)) == 5
    assert random_crop_boxes(100, 200, 0.5, 8) != boxes


def test_random_crops_reach_every_place_about_equally_often():
    boxes = [box for image_id in range(400) for box in random_crop_boxes(8, 6, 0.5, image_id)]
    tops, lefts = (np.bincount([getattr(box, a) for box in boxes]) for a in ("top", "left"))
    assert len(tops) == 5  # 8 - 4 + 1 places
    assert len(lefts) == 4
    # 2000 draws; 5 standard deviations are 90 of 400 and 97 of 500.
    assert abs(tops - 400).max() < 90
    assert abs(lefts - 500).max() < 97


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (100, 3)])
def test_a_random_crop_as_large_as_the_image_is_the_image(size):
    assert random_crop_boxes(*size, 1.0, 3) == [Box(0, 0, *size)] * 5


def test_labels_of_half_the_size_are_cut_at_the_same_places():
    for large, small in zip(
        random_crop_boxes(400, 600, 0.5, 5), random_crop_boxes(200, 300, 0.5, 5), strict=True
    ):
        assert abs(large.top / 2 - small.top) <= 1
        assert abs(large.left / 2 - small.left) <= 1


def test_random_views_are_the_centre_squares_of_the_crops_and_need_an_image_id():
    squares = [centre_square(box) for box in random_crop_boxes(30, 50, 0.6, 9)]
    assert view_boxes(30, 50, crops="random", ratio=0.6, image_id=9) == squares
    with pytest.raises(ValueError, match="image's id"):
        view_boxes(30, 50, crops="random", ratio=0.6)

from __future__ import annotations

import numpy as np
import pytest

from stego_core.errors import ConfigError, ShapeError
from stego_core.masks.palette import cluster_colors
from stego_core.viz.overlay import (
    NO_CLUSTER_COLOR,
    borders,
    colorize,
    crop_around,
    fit_pixels,
    mask_image,
    overlay,
    resize_labels,
)

RNG = np.random.default_rng(0)
COLORS = cluster_colors(5)
PIXELS = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
LABELS = RNG.integers(0, 5, (6, 8), dtype=np.uint8)


def test_each_pixel_has_the_color_of_its_cluster_and_255_is_grey():
    labels = LABELS.copy()
    labels[2, 3] = 255
    drawn = colorize(labels, COLORS)
    for row in range(6):
        for column in range(8):
            label = labels[row, column]
            wanted = NO_CLUSTER_COLOR if label == 255 else COLORS[label]
            assert tuple(drawn[row, column]) == tuple(wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_255_is_a_cluster_where_there_are_more_than_255(dtype):
    colors = cluster_colors(300)
    drawn = colorize(np.array([[255, 7]], dtype=dtype), colors)
    np.testing.assert_array_equal(drawn[0], colors[[255, 7]])


def test_negative_labels_are_grey_and_not_counted_from_the_end():
    assert tuple(colorize(np.array([[-1]]), COLORS)[0, 0]) == NO_CLUSTER_COLOR


def test_an_overlay_mixes_image_and_color_by_its_opacity_away_from_borders():
    labels = np.full((6, 8), 3)
    mixed = overlay(PIXELS, labels, COLORS, opacity=0.55)
    wanted = 0.45 * PIXELS + 0.55 * COLORS[3].astype(float)
    # 0.55 becomes 141/256, and the result is rounded once.
    assert np.abs(mixed - wanted).max() <= 0.5 + 255 * abs(141 / 256 - 0.55)


def test_opacity_zero_is_the_image_and_one_is_the_mask_in_a_map_without_borders():
    labels = np.full((6, 8), 2)
    np.testing.assert_array_equal(overlay(PIXELS, labels, COLORS, opacity=0), PIXELS)
    np.testing.assert_array_equal(
        overlay(PIXELS, labels, COLORS, opacity=1), colorize(labels, COLORS)
    )


def test_borders_are_where_the_right_or_lower_neighbour_differs():
    found = borders(LABELS)
    for row in range(6):
        for column in range(8):
            right = column < 7 and LABELS[row, column] != LABELS[row, column + 1]
            below = row < 5 and LABELS[row, column] != LABELS[row + 1, column]
            assert found[row, column] == (right or below)


def test_a_border_is_lighter_than_a_dark_color_and_darker_than_a_light_one():
    dark_light = np.array([[0, 0, 100], [200, 200, 0]], dtype=np.uint8)
    pixels = np.zeros((2, 4, 3), dtype=np.uint8)
    drawn = overlay(pixels, np.array([[0, 0, 1, 1], [0, 0, 0, 0]]), dark_light, opacity=1)
    assert drawn[0, 1].tolist() == [128, 128, 178]  # halfway from dark blue to white
    assert drawn[0, 2].tolist() == [100, 100, 0]  # halfway from yellow to black


def test_a_smaller_label_map_is_spread_over_the_image():
    labels = np.array([[0, 1], [2, 3]])
    same = overlay(PIXELS, np.kron(labels, np.ones((3, 4), dtype=int)), COLORS)
    np.testing.assert_array_equal(overlay(PIXELS, labels, COLORS), same)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (6, 8), (7, 9), (13, 40)])
def test_a_resized_label_is_the_one_under_the_centre_of_the_pixel(size):
    resized = resize_labels(LABELS, *size)
    assert resized.shape == size
    for row in range(size[0]):
        for column in range(size[1]):
            y = int((row + 0.5) * 6 / size[0])
            x = int((column + 0.5) * 8 / size[1])
            assert resized[row, column] == LABELS[y, x]


def test_a_palette_mask_holds_the_cluster_ids_and_their_colors():
    labels = np.array([[0, 4], [255, 2]], dtype=np.uint8)
    mask = mask_image(labels, COLORS)
    assert mask.mode == "P"
    np.testing.assert_array_equal(np.asarray(mask), labels)
    np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), colorize(labels, COLORS))


def test_a_mask_of_more_clusters_than_a_palette_holds_is_rgb():
    labels = np.array([[0, 299]])
    mask = mask_image(labels, cluster_colors(300))
    assert mask.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(mask), colorize(labels, cluster_colors(300)))


def test_a_crop_shows_the_cluster_whole_and_pales_the_rest():
    pixels = np.zeros((60, 90, 3), dtype=np.uint8)
    labels = np.zeros((60, 90), dtype=np.uint8)
    labels[40:50, 70:80] = 1
    pixels[labels == 1] = (200, 0, 0)
    crop = crop_around(pixels, labels, 1, np.array([0, 255, 0], dtype=np.uint8), 40)
    assert crop.shape == (40, 40, 3)
    # The window is 20 pixels wide (a third of 60), centred on the 10 of the cluster.
    assert crop[20, 20].tolist() == [200, 0, 0]
    assert crop[2, 2].min() > 100
    assert crop[37, 37].min() > 100
    assert (crop == [0, 255, 0]).all(axis=2).sum() in range(70, 90)


def test_a_crop_of_a_cluster_that_covers_all_is_the_widest_square():
    pixels = np.full((10, 30, 3), 50, dtype=np.uint8)
    crop = crop_around(pixels, np.zeros((10, 30), dtype=int), 0, COLORS[0], 16)
    np.testing.assert_array_equal(crop, np.full((16, 16, 3), 50))


@pytest.mark.parametrize(
    ("shape", "fitted"),
    [((100, 640), (50, 320)), ((960, 320), (480, 160)), ((9, 9), (9, 9)), ((1, 9000), (1, 320))],
)
def test_an_image_is_shrunk_into_the_box_in_proportion(shape, fitted):
    assert fit_pixels(np.zeros((*shape, 3), dtype=np.uint8), (320, 480)).shape == (*fitted, 3)


def test_what_is_no_label_map_or_no_image_is_refused():
    with pytest.raises(ShapeError, match="float64"):
        colorize(np.zeros((2, 2)), COLORS)
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        colorize(np.zeros((2, 2), dtype=int), COLORS[0])
    with pytest.raises(ShapeError, match=r"\(0, 4\)"):
        resize_labels(np.zeros((0, 4), dtype=int), 5, 5)
    with pytest.raises(ShapeError, match="float32"):
        overlay(PIXELS.astype(np.float32), LABELS, COLORS)
    with pytest.raises(ConfigError, match=r"1\.5"):
        overlay(PIXELS, LABELS, COLORS, opacity=1.5)

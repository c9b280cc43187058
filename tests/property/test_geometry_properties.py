"""What holds for boxes, grids and resized labels of any image."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from stego_core.images.geometry import (
    Box,
    centre_square,
    fit_grid,
    five_crop_boxes,
    resize_image,
    resize_labels,
    view_boxes,
)

SIDES = st.integers(1, 40_000)
RATIOS = st.floats(0.001, 1.0)
PATCHES = st.sampled_from([8, 14, 16])


def is_inside(box, height, width):
    rows_fit = box.top >= 0 and box.height >= 1 and box.top + box.height <= height
    return rows_fit and box.left >= 0 and box.width >= 1 and box.left + box.width <= width


@given(SIDES, SIDES, RATIOS)
def test_five_crops_lie_inside_the_image_and_reach_its_corners(height, width, ratio):
    boxes = five_crop_boxes(height, width, ratio)
    assert len(boxes) == 5
    assert all(is_inside(box, height, width) for box in boxes)
    assert len({(box.height, box.width) for box in boxes}) == 1
    assert (boxes[0].top, boxes[0].left) == (0, 0)
    assert (boxes[3].top + boxes[3].height, boxes[3].left + boxes[3].width) == (height, width)
    assert (boxes[1].top, boxes[2].left) == (0, 0)
    assert (boxes[1].left, boxes[2].top) == (boxes[3].left, boxes[3].top)


@given(SIDES, SIDES, RATIOS)
def test_centre_crops_are_centred_to_half_a_pixel(height, width, ratio):
    centre = five_crop_boxes(height, width, ratio)[4]
    assert abs(2 * centre.top + centre.height - height) <= 1
    assert abs(2 * centre.left + centre.width - width) <= 1


@given(SIDES, SIDES, st.sampled_from(["whole", "five", "random"]), RATIOS, st.integers(0, 2**63))
def test_views_are_squares_inside_the_image(height, width, crops, ratio, image_id):
    boxes = view_boxes(height, width, crops=crops, ratio=ratio, image_id=image_id)
    assert len(boxes) == {"whole": 1, "five": 5, "random": 5}[crops]
    for box in boxes:
        assert box.height == box.width
        assert is_inside(box, height, width)


@given(st.builds(Box, st.integers(0, 99), st.integers(0, 99), SIDES, SIDES))
def test_a_centre_square_is_the_largest_that_fits(box):
    square = centre_square(box)
    assert square.height == square.width == min(box.height, box.width)
    assert box.top <= square.top <= square.top + square.height <= box.top + box.height
    assert box.left <= square.left <= square.left + square.width <= box.left + box.width


@given(SIDES, SIDES, st.integers(8, 1024), PATCHES)
def test_a_grid_has_a_row_a_column_and_at_most_15_percent_too_many_tokens(
    height, width, resolution, patch
):
    rows, columns = fit_grid(height, width, resolution=resolution, patch=patch)
    assert min(rows, columns) >= 1
    assert rows * columns <= max(1, 1.15 * (resolution / patch) ** 2)


@given(SIDES, SIDES, st.integers(8, 1024), PATCHES)
def test_swapping_the_sides_swaps_the_grid(height, width, resolution, patch):
    rows, columns = fit_grid(height, width, resolution=resolution, patch=patch)
    assert fit_grid(width, height, resolution=resolution, patch=patch) == (columns, rows)


@given(st.integers(100, 4000), st.floats(1 / 3, 3), st.integers(224, 1024), PATCHES)
def test_of_ordinary_images_area_and_aspect_ratio_are_kept(height, aspect, resolution, patch):
    width = round(height * aspect)
    rows, columns = fit_grid(height, width, resolution=resolution, patch=patch)
    tokens = (resolution / patch) ** 2
    # The ideal grid rounded to the nearest is a candidate or has too many tokens, so half a
    # token on the shorter side, twice, bounds each of the two errors.
    bound = 2 / (math.sqrt(tokens * min(height, width) / max(height, width)) - 0.5)
    assert abs(math.log(rows * columns / tokens)) <= bound
    assert abs(math.log(columns / rows / (width / height))) <= bound


@given(st.integers(1, 5000), st.integers(8, 512), PATCHES)
def test_square_images_have_square_grids(side, resolution, patch):
    rows, columns = fit_grid(side, side, resolution=resolution, patch=patch)
    assert rows == columns


@given(
    npst.arrays(
        st.sampled_from([np.uint8, np.uint16]),
        npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20),
    ),
    st.integers(1, 40),
    st.integers(1, 40),
    st.data(),
)
def test_resized_labels_invent_no_value(labels, height, width, data):
    top = data.draw(st.integers(0, labels.shape[0] - 1))
    left = data.draw(st.integers(0, labels.shape[1] - 1))
    box = Box(top, left, labels.shape[0] - top, labels.shape[1] - left)
    resized = resize_labels(labels, height, width, box=box)
    assert resized.dtype == labels.dtype
    assert resized.shape == (height, width)
    assert set(resized.ravel()) <= set(labels[top:, left:].ravel())


@given(
    npst.arrays(np.uint8, npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20)),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_resized_pixels_stay_between_the_darkest_and_the_brightest(grey, height, width):
    resized = resize_image(np.repeat(grey[..., None], 3, axis=2), height, width)
    assert grey.min() <= resized.min() <= resized.max() <= grey.max()

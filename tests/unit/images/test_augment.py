from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from factories import picture

from stego_core.images.augment import (
    Augmentation,
    augment,
    change_color,
    draw_augmentation,
    source_coords,
)
from stego_core.images.geometry import Box

SIDE = 24


def drawn(count=400, *, seed=0):
    generator = np.random.default_rng(seed)
    return [draw_augmentation(generator, SIDE) for _ in range(count)]


def plain(flip=False, box=(0, 0, SIDE, SIDE)):
    return Augmentation(flip=flip, box=Box(*box))


def ramp():
    """A picture whose colours are its columns and rows."""
    rows, columns = np.mgrid[:SIDE, :SIDE] * 10
    return np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)


def shown(pixels, augmentation, grid=SIDE):
    """What `source_coords` says the augmented view shows."""
    coords = torch.from_numpy(source_coords(augmentation, SIDE, grid, grid))[None]
    maps = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].double()
    sampled = torch.nn.functional.grid_sample(
        maps, coords, padding_mode="border", align_corners=False
    )
    return sampled[0].permute(1, 2, 0).numpy()


def test_a_flip_mirrors_the_picture_left_to_right_and_the_coordinates_follow():
    pixels = picture(SIDE, SIDE)
    found = augment(pixels, plain(flip=True))
    np.testing.assert_array_equal(found, pixels[:, ::-1])
    np.testing.assert_allclose(shown(pixels, plain(flip=True)), found, atol=1e-9)
    assert not np.array_equal(found, pixels[::-1])


def test_nothing_to_do_leaves_the_picture_alone():
    pixels = picture(SIDE, SIDE)
    np.testing.assert_array_equal(augment(pixels, plain()), pixels)
    np.testing.assert_allclose(shown(pixels, plain()), pixels, atol=1e-9)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [(0, 0, 12, 24), (3, 1, 20, 22), (4, 0, 20, 24)])
def test_the_coordinates_of_a_crop_lead_to_what_it_shows(flip, box):
    change = plain(flip=flip, box=box)
    # A ramp of steps of 10 is the same however it is interpolated, up to rounding and to the
    # border, where the resized crop can't see beyond itself.
    found, expected = augment(ramp(), change).astype(float), shown(ramp(), change)
    inner = (slice(2, -2), slice(2, -2))
    np.testing.assert_allclose(found[inner], expected[inner], atol=1.01)


def test_a_crop_of_the_mirrored_picture_is_what_is_cut():
    # The flip comes first: the left half of the mirrored picture is the right half of the picture.
    change = plain(flip=True, box=(0, 0, SIDE, 12))
    assert source_coords(change, SIDE, 4, 4)[..., 0].min() > 0
    assert augment(ramp(), change)[..., 0].min() >= 110


def test_the_draws_follow_from_the_generator_alone():
    assert drawn(20) == drawn(20)
    assert drawn(20) != drawn(20, seed=1)


def test_the_draws_have_the_shares_and_ranges_of_the_original():
    draws = drawn()
    # 400 draws: the standard errors are at most 0.025.
    for share, expected in (
        (np.mean([d.flip for d in draws]), 0.5),
        (np.mean([d.grey for d in draws]), 0.2),
        (np.mean([d.blur > 0 for d in draws]), 0.5),
    ):
        assert share == pytest.approx(expected, abs=0.1)
    for draw in draws:
        top, left, height, width = draw.box
        assert top >= 0
        assert left >= 0
        assert top + height <= SIDE
        assert left + width <= SIDE
        # Rounding to whole pixels moves the area by at most one row and column.
        assert 0.8 - 0.06 <= height * width / SIDE**2 <= 1
        assert 0.7 <= width / height <= 1 / 0.7
        values = dict(draw.jitter)
        assert sorted(values) == ["brightness", "contrast", "hue", "saturation"]
        assert abs(values.pop("hue")) <= 0.1
        assert all(0.7 <= value <= 1.3 for value in values.values())
        assert draw.blur == 0 or 0.1 <= draw.blur <= 2
    assert len({tuple(name for name, _ in draw.jitter) for draw in draws}) == 24


def test_brightness_contrast_and_saturation_are_blends_of_two_pictures():
    pixels = picture(5, 6)
    grey = pixels @ np.array([299, 587, 114]) / 1000
    against = {
        "brightness": np.zeros_like(pixels, float),
        "saturation": np.repeat(grey[..., None], 3, -1),
        "contrast": np.full(pixels.shape, grey.mean()),
    }
    for name, other in against.items():
        for factor in (0.0, 0.7, 1.0, 1.3):
            expected = np.clip(factor * pixels + (1 - factor) * other, 0, 255)
            found = change_color(pixels, name, factor)
            # Greys are rounded once more on the way, and fractions are cut off.
            np.testing.assert_allclose(found, expected, atol=2, err_msg=name)


def test_the_hue_turns_on_the_colour_wheel():
    pixels = np.array([[[200, 40, 40], [40, 200, 40], [90, 90, 90]]], np.uint8)
    for turn in (-0.1, 0.1, 1 / 3):
        found = change_color(pixels, "hue", turn)
        for before, after in zip(pixels[0], found[0], strict=True):
            h, s, v = colorsys.rgb_to_hsv(*before / 255)
            expected = np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v)) * 255
            np.testing.assert_allclose(after, expected, atol=6)  # hue in 256 steps
    np.testing.assert_allclose(change_color(pixels, "hue", 0.0), pixels, atol=2)


def test_grey_has_no_colour():
    found = augment(picture(SIDE, SIDE), Augmentation(False, Box(0, 0, SIDE, SIDE), grey=True))
    assert (found == found[..., :1]).all()


def test_the_blur_spreads_a_dot_over_five_by_five_pixels_and_keeps_its_sum():
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[10, 12] = 255
    found = augment(pixels, Augmentation(False, Box(0, 0, SIDE, SIDE), blur=1.5))
    assert (found[8:13, 10:15] > 0).all()
    found[8:13, 10:15] = 0
    assert not found.any()
    weights = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    again = augment(pixels, Augmentation(False, Box(0, 0, SIDE, SIDE), blur=1.5))
    np.testing.assert_allclose(again[8:13, 10:15, 0], 255 * np.outer(weights, weights), atol=0.51)
    even = np.full((SIDE, SIDE, 3), 77, np.uint8)
    np.testing.assert_array_equal(
        augment(even, Augmentation(False, Box(0, 0, SIDE, SIDE), blur=2.0)), even
    )


def test_colours_are_changed_in_the_order_of_the_draw():
    pixels = picture(SIDE, SIDE)
    orders = [(("brightness", 1.3), ("contrast", 0.7)), (("contrast", 0.7), ("brightness", 1.3))]
    whole = Box(0, 0, SIDE, SIDE)
    first, second = (augment(pixels, Augmentation(False, whole, jitter=o)) for o in orders)
    expected = change_color(change_color(pixels, "brightness", 1.3), "contrast", 0.7)
    np.testing.assert_array_equal(first, expected)
    assert not np.array_equal(first, second)

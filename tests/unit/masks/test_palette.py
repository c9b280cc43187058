from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from stego_core.errors import ConfigError
from stego_core.masks.palette import MAX_COLORS, cluster_colors, color_hex

# Machado, Oliveira and Fernandes 2009, severity 1.0, for linear RGB.
DICHROMACY = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def linear(colors: np.ndarray) -> np.ndarray:
    encoded = colors / 255.0
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def cielab(linear_rgb: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* under D65, from linear sRGB."""
    xyz = np.clip(linear_rgb, 0, 1) @ np.array(
        [[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]]
    )
    ratio = xyz / [0.9505, 1.0, 1.089]
    curved = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = curved.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def smallest_distance(lab: np.ndarray) -> float:
    return min(float(np.linalg.norm(a - b)) for a, b in combinations(lab, 2))


def test_the_first_twenty_colors_are_well_separated_in_cielab():
    assert smallest_distance(cielab(linear(cluster_colors(20)))) > 20


@pytest.mark.parametrize("vision", DICHROMACY)
def test_the_first_twenty_colors_stay_apart_with_red_green_blindness(vision):
    seen = linear(cluster_colors(20)) @ np.array(DICHROMACY[vision]).T
    assert smallest_distance(cielab(seen)) > 10


def test_the_colors_of_a_usual_cluster_count_are_well_separated():
    assert smallest_distance(cielab(linear(cluster_colors(27)))) > 20


def test_the_color_of_a_cluster_does_not_depend_on_the_count():
    everything = cluster_colors(MAX_COLORS)
    for count in (0, 1, 2, 20, 21, 27, 255, 256, 257, 1000, 65534):
        np.testing.assert_array_equal(cluster_colors(count), everything[:count])


def test_no_two_of_all_colors_are_equal_and_none_is_black_white_or_grey():
    colors = cluster_colors(MAX_COLORS)
    assert colors.dtype == np.uint8
    assert colors.shape == (65535, 3)
    assert len({tuple(color) for color in colors.tolist()}) == 65535
    spread = colors.max(axis=1).astype(int) - colors.min(axis=1)
    assert spread.min() >= 20


def test_colors_once_given_are_kept_by_later_versions():
    colors = cluster_colors(MAX_COLORS)
    kept = {position: color_hex(colors[position]) for position in (0, 19, 20, 26, 255, 256, 65534)}
    assert kept == {
        0: "#748cf8",
        19: "#14bca4",
        20: "#a811ff",
        26: "#0006da",
        255: "#3fa245",
        256: "#23d799",
        65534: "#938b5c",
    }


def test_the_caller_may_write_into_the_colors():
    cluster_colors(3)[:] = 0
    assert cluster_colors(3).any()


@pytest.mark.parametrize("count", [-1, 65536])
def test_a_count_out_of_range_is_one_readable_line(count):
    with pytest.raises(ConfigError, match=str(count)) as caught:
        cluster_colors(count)
    assert "\n" not in str(caught.value)


def test_a_color_in_css_has_six_digits():
    assert color_hex(np.array([0, 10, 255], dtype=np.uint8)) == "#000aff"

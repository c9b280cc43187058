"""The colour of each cluster, the same in masks, overlays, legends and reports."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from stego_core.errors import ConfigError

MAX_COLORS = 65535
"""Cluster ids fit in 16 bits, and the largest value is kept for pixels without a cluster."""

# Found by a max-min search over CIELAB, with dichromacy simulated as in Machado et al. 2009, and
# ordered so that every prefix is well separated too. Smallest CIEDE2000 distance of all 20: 16.2
# in normal vision, 10.3 in protanopia, 10.1 in deuteranopia; of the first 8: 22, 15 and 16.
_BASE = (
    (116, 140, 248), (248, 236, 56), (68, 80, 32), (128, 248, 248), (224, 116, 20),
    (44, 56, 140), (200, 128, 140), (176, 248, 176), (44, 128, 152), (56, 128, 92),
    (128, 20, 80), (236, 20, 80), (224, 32, 152), (128, 104, 32), (236, 176, 68),
    (140, 92, 116), (44, 92, 236), (188, 152, 200), (176, 188, 140), (20, 188, 164),
)  # fmt: skip
# Up to here each colour is the candidate farthest from all earlier ones; beyond, eyes can't tell
# so many colours apart and the colours are only distinct.
_NUM_SEPARATED = 256
_NUM_CANDIDATES = 4096


def cluster_colors(count: int) -> np.ndarray:
    """Return the colours of clusters 0 … count-1.

    The first 20 are fixed and can be told apart with red-green colour blindness; the others are
    computed. No two are equal, none is near black, white or grey, and the colour of a cluster
    does not depend on `count`.

    Args:
        count: number of clusters, 0–65535.

    Returns:
        sRGB colours, uint8 (count, 3); the caller owns the array.

    Raises:
        ConfigError: `count` is out of range.

    Example:
        >>> cluster_colors(2).tolist()
        [[116, 140, 248], [248, 236, 56]]
    """
    if not 0 <= count <= MAX_COLORS:
        raise ConfigError(f"there are colours for 0 to {MAX_COLORS} clusters, not for {count}")
    table = _separated_colors() if count <= _NUM_SEPARATED else _all_colors()
    return table[:count].copy()


def color_hex(rgb: np.ndarray | tuple[int, int, int]) -> str:
    """Return a colour as CSS writes it.

    Args:
        rgb: three values, 0–255.

    Example:
        >>> color_hex((116, 140, 248))
        '#748cf8'
    """
    red, green, blue = (int(value) for value in rgb)
    return f"#{red:02x}{green:02x}{blue:02x}"


@lru_cache(maxsize=1)
def _separated_colors() -> np.ndarray:
    """Return the base colours, then each time the candidate farthest from all so far."""
    candidates = _candidates(_NUM_CANDIDATES)
    perceptual = _to_oklab(candidates)
    chosen = np.array(_BASE, dtype=np.uint8)
    distances = np.full(len(candidates), np.inf)
    for color in _to_oklab(chosen):
        distances = np.minimum(distances, np.square(perceptual - color).sum(axis=1))
    extra = np.empty(_NUM_SEPARATED - len(_BASE), dtype=np.int64)
    for position in range(len(extra)):
        # Rounding makes ties of near-ties, so that the last bits of a machine's arithmetic do
        # not choose the colour.
        farthest = int(np.argmax(np.round(distances, 9)))
        extra[position] = farthest
        step = np.square(perceptual - perceptual[farthest]).sum(axis=1)
        distances = np.minimum(distances, step)
    return np.concatenate([chosen, candidates[extra]])


@lru_cache(maxsize=1)
def _all_colors() -> np.ndarray:
    """Return all 65535 colours, (65535, 3): the separated ones, then candidates in order."""
    stream = np.concatenate([_separated_colors(), _candidates(4 * MAX_COLORS)])
    codes = stream.astype(np.int64) @ np.array([65536, 256, 1])
    _, first = np.unique(codes, return_index=True)
    colors: np.ndarray = stream[np.sort(first)[:MAX_COLORS]]
    return colors


def _candidates(num_points: int) -> np.ndarray:
    """Return the usable ones of `num_points` evenly spread sRGB colours, uint8 (n, 3).

    A shorter list is a prefix of a longer one. Colours near black, white or grey are left out:
    grey marks pixels without a cluster.

    Source: the R3 sequence of M. Roberts, "The unreasonable effectiveness of quasirandom
        sequences", 2018; 1.2207… is the real root of x^4 = x + 1.
    """
    root = 1.2207440846057596
    steps = np.array([1 / root, 1 / root**2, 1 / root**3])
    points = (0.5 + np.arange(1, num_points + 1)[:, None] * steps) % 1.0
    colors = (points * 256).astype(np.uint8)
    lab = _to_oklab(colors)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable: np.ndarray = colors[(lab[:, 0] > 0.35) & (lab[:, 0] < 0.93) & (chroma > 0.05)]
    return usable


def _to_oklab(colors: np.ndarray) -> np.ndarray:
    """Return sRGB colours (n, 3) in OKLab, where distance follows perception.

    Source: B. Ottosson, "A perceptual color space for image processing", 2020.
    """
    encoded = colors / 255.0
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    to_cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    lab: np.ndarray = np.cbrt(linear @ to_cones.T) @ to_lab.T
    return lab

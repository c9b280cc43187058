"""Draw label maps: in flat colours, over their photographs, and as crops around one cluster."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from stego_core.errors import ConfigError, ShapeError

# H W: pixels of the image; h w: pixels of a label map, which may be smaller.

NO_CLUSTER_COLOR = (128, 128, 128)
"""Colour of pixels without a cluster; no cluster has a grey."""

_JPEG_QUALITY = 85
_LUMA = np.array([77, 150, 29], dtype=np.uint32)  # Rec. 601 weights in 1/256


def colorize(labels_HW: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Return the label map in the clusters' colours.

    Args:
        labels_HW: cluster ids, integers (H, W). A value that is no cluster id (255, the
            `ignore_index`, where there are at most 255 clusters) becomes mid grey.
        colors: uint8 (N, 3), one row for each cluster.

    Returns:
        uint8 RGB, (H, W, 3).

    Raises:
        ShapeError: the label map is not an integer map of two dimensions, or `colors` is not
            (N, 3).
    """
    _check_labels(labels_HW)
    if colors.ndim != 2 or colors.shape[1] != 3:
        raise ShapeError(f"colors should be (clusters, 3), not {colors.shape}")
    table = np.vstack([colors, NO_CLUSTER_COLOR]).astype(np.uint8)
    is_cluster = (labels_HW >= 0) & (labels_HW < len(colors))
    drawn: np.ndarray = table[np.where(is_cluster, labels_HW.astype(np.int64), len(colors))]
    return drawn


def overlay(
    pixels_HWC: np.ndarray,
    labels_HW: np.ndarray,
    colors: np.ndarray,
    *,
    opacity: float = 0.55,
) -> np.ndarray:
    """Return the photograph tinted with the clusters' colours, with thin borders between them.

    A border pixel has its own cluster's colour, lightened if that is dark and darkened if not.

    Args:
        pixels_HWC: uint8 RGB, (H, W, 3).
        labels_HW: cluster ids, integers; resized by nearest neighbour if it is not (H, W).
        colors: uint8 (N, 3), one row for each cluster.
        opacity: share of the colour in the mix, 0 (the photograph) to 1 (the mask).

    Returns:
        uint8 RGB, (H, W, 3).

    Raises:
        ShapeError: an array has the wrong shape or type.
        ConfigError: `opacity` is not in [0, 1].
    """
    check_pixels(pixels_HWC)
    if not 0.0 <= opacity <= 1.0:
        raise ConfigError(f"the overlay opacity is {opacity}, but should be from 0 to 1")
    labels = resize_labels(labels_HW, pixels_HWC.shape[0], pixels_HWC.shape[1])
    tint = colorize(labels, colors)
    mixed = _mix(pixels_HWC, tint, opacity)
    edge = borders(labels)
    border_colors = tint[edge]
    is_dark = border_colors.astype(np.uint32) @ _LUMA < 128 * 256
    target = np.where(is_dark[:, None], 255, 0).astype(np.uint8)
    mixed[edge] = _mix(border_colors, target, 0.5)
    return mixed


def borders(labels_HW: np.ndarray) -> np.ndarray:
    """Return a bool map (H, W): true where the pixel to the right or below has another label."""
    edge = np.zeros(labels_HW.shape, dtype=bool)
    edge[:, :-1] |= labels_HW[:, :-1] != labels_HW[:, 1:]
    edge[:-1, :] |= labels_HW[:-1, :] != labels_HW[1:, :]
    return edge


def resize_labels(labels_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the label map at another size: each pixel takes the label under its centre.

    Args:
        labels_HW: integers (h, w).
        height: rows wanted, pixels.
        width: columns wanted, pixels.

    Raises:
        ShapeError: the label map is not an integer map of two dimensions, or is empty.
    """
    _check_labels(labels_HW)
    if labels_HW.shape == (height, width):
        return labels_HW
    if 0 in labels_HW.shape:
        raise ShapeError(f"a label map of {labels_HW.shape} pixels can't be resized")
    rows = (2 * np.arange(height) + 1) * labels_HW.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * labels_HW.shape[1] // (2 * width)
    resized: np.ndarray = labels_HW[rows[:, None], columns]
    return resized


def crop_around(
    pixels_HWC: np.ndarray, labels_HW: np.ndarray, cluster: int, color: np.ndarray, size: int
) -> np.ndarray:
    """Return a square crop of the photograph where the cluster covers most of it.

    The side of the crop follows the cluster's area, from a third of the image's short side to
    all of it. What is outside the cluster is paled and loses half its colour; the cluster keeps
    its pixels and gets an outline.

    Args:
        pixels_HWC: uint8 RGB, (H, W, 3).
        labels_HW: cluster ids, integers (H, W).
        cluster: the cluster to look for.
        color: uint8 (3,), the colour of the outline.
        size: side of the returned image, pixels.

    Returns:
        uint8 RGB, (size, size, 3).
    """
    is_cluster = labels_HW == cluster
    short = min(is_cluster.shape)
    wanted = round(1.2 * float(is_cluster.sum()) ** 0.5)
    side = min(max(wanted, short // 3, 1), short)
    top, left = _densest_window(is_cluster, side)
    box = (left, top, left + side, top + side)
    image = Image.fromarray(pixels_HWC).resize((size, size), Image.Resampling.LANCZOS, box=box)
    crop = np.asarray(image)
    window = is_cluster[top : top + side, left : left + side]
    inside = resize_labels(window.astype(np.uint8), size, size)
    grey = ((crop.astype(np.uint32) @ _LUMA) >> 8).astype(np.uint8)
    dull = _mix(crop, np.repeat(grey[..., None], 3, axis=2), 0.5)
    pale = _mix(dull, np.full_like(crop, 232), 0.6)
    shown = np.where(inside[..., None] == 1, crop, pale)
    shown[borders(inside)] = color
    return shown


def mask_image(labels_HW: np.ndarray, colors: np.ndarray) -> Image.Image:
    """Return the label map as an image to be saved as PNG.

    With at most 255 clusters it has a palette: its values are the cluster ids, and 255 where
    there is no cluster. With more it is RGB.

    Args:
        labels_HW: cluster ids, integers (H, W).
        colors: uint8 (N, 3), one row for each cluster.

    Raises:
        ShapeError: as `colorize`.
    """
    drawn = colorize(labels_HW, colors)
    if len(colors) > 255:
        return Image.fromarray(drawn)
    is_cluster = (labels_HW >= 0) & (labels_HW < len(colors))
    mask = Image.fromarray(np.where(is_cluster, labels_HW, 255).astype(np.uint8))
    palette = np.full((256, 3), NO_CLUSTER_COLOR, dtype=np.uint8)
    palette[: len(colors)] = colors
    mask.putpalette(palette.tobytes())
    return mask


def fit_pixels(pixels_HWC: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """Return the image shrunk to fit into a box; one that fits is returned as it is.

    Args:
        pixels_HWC: uint8 RGB, (H, W, 3).
        box: largest width and height, pixels.
    """
    height, width = pixels_HWC.shape[:2]
    scale = min(box[0] / width, box[1] / height)
    if scale >= 1:
        return pixels_HWC
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    image = Image.fromarray(pixels_HWC)
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0))


def encode_jpeg(pixels_HWC: np.ndarray) -> bytes:
    """Return uint8 RGB (H, W, 3) as a JPEG file without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _mix(below: np.ndarray, above: np.ndarray, opacity: float) -> np.ndarray:
    """Return uint8 `above` over `below`, in integers so that the bytes are the same anywhere."""
    weight = round(opacity * 256)
    mixed = below.astype(np.uint32) * (256 - weight) + above.astype(np.uint32) * weight + 128
    return (mixed >> 8).astype(np.uint8)


def check_pixels(pixels_HWC: np.ndarray) -> None:
    """Check that an image is uint8 RGB of at least one pixel.

    Raises:
        ShapeError: it is not.
    """
    is_rgb = pixels_HWC.ndim == 3 and pixels_HWC.shape[2] == 3 and pixels_HWC.dtype == np.uint8
    if not is_rgb or 0 in pixels_HWC.shape:
        raise ShapeError(
            f"an image should be uint8 (H, W, 3), not {pixels_HWC.dtype} {pixels_HWC.shape}"
        )


def _check_labels(labels_HW: np.ndarray) -> None:
    if labels_HW.ndim != 2 or not np.issubdtype(labels_HW.dtype, np.integer):
        raise ShapeError(
            f"a label map should be integers (H, W), not {labels_HW.dtype} {labels_HW.shape}"
        )


def _densest_window(is_cluster: np.ndarray, side: int) -> tuple[int, int]:
    """Return (top, left) of the square window of `side` pixels with the most true pixels."""
    sums = np.zeros((is_cluster.shape[0] + 1, is_cluster.shape[1] + 1), dtype=np.int64)
    sums[1:, 1:] = is_cluster.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
    inside = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    # Many windows hold the whole of a small cluster: the middle one of those shows it centred.
    tops, lefts = np.nonzero(inside == inside.max())
    middle = (np.square(tops - tops.mean()) + np.square(lefts - lefts.mean())).argmin()
    return int(tops[middle]), int(lefts[middle])

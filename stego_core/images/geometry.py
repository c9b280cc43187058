"""Where crops, views and token grids lie, and resizing to them; pure functions.

`H` and `W` are pixels of the upright image; a box is (top, left, height, width) in those pixels.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stego_core.errors import ShapeError

_Label = TypeVar("_Label", bound=np.integer[Any])

_RANDOM_CROPS = 5  # as many as the original draws
_MAX_EXCESS = 1.15  # a grid may have at most this many times the tokens of the square grid


class Box(NamedTuple):
    """A rectangle of whole pixels: the first row and column, then the size."""

    top: int
    left: int
    height: int
    width: int


def fit_grid(height: int, width: int, *, resolution: int, patch: int) -> tuple[int, int]:
    """Find the token grid that keeps an image's aspect ratio at the cost of a square view.

    The grid has about (resolution / patch)² tokens, at most 15 % more, and at least one row and
    one column, so a panorama loses aspect ratio rather than rows. Grids next to the ideal one are
    compared by the relative error of their area plus that of their aspect ratio. Swapping height
    and width swaps the grid.

    Args:
        height: Of the image, pixels, at least 1.
        width: Of the image, pixels, at least 1.
        resolution: Side of the square whose area the grid should cover, pixels.
        patch: Side of a token, pixels.

    Returns:
        Rows and columns (h, w); the network's input has h·patch × w·patch pixels.

    Examples:
        >>> fit_grid(480, 640, resolution=224, patch=14)
        (14, 18)
        >>> fit_grid(1, 10000, resolution=224, patch=14)
        (1, 256)
    """
    tokens = max(1.0, (resolution / patch) ** 2)
    aspect = min(height, width) / max(height, width)

    def error(grid: tuple[int, int]) -> tuple[float, float]:
        area_error = abs(math.log(grid[0] * grid[1] / tokens))
        aspect_error = abs(math.log(grid[0] / grid[1] / aspect))
        # Rounded, so that equal sums are equal; of those, the truer shape.
        return round(area_error + aspect_error, 9), aspect_error

    ideal = math.sqrt(tokens * aspect)
    candidates = [
        (rows, columns)
        for rows in _around(ideal)
        for columns in (*_around(tokens / ideal), *_around(tokens / rows))
        if rows * columns <= tokens * _MAX_EXCESS
    ]
    short, long = min(candidates, key=error)
    return (short, long) if height <= width else (long, short)


def five_crop_boxes(height: int, width: int, ratio: float) -> list[Box]:
    """Place the four corner crops and the centre crop.

    Args:
        height: Of the image, pixels.
        width: Of the image, pixels.
        ratio: Side of a crop as a share of the image's side, (0, 1]; rounded down to whole
            pixels, but never to less than one.

    Returns:
        Top left, top right, bottom left, bottom right, centre.

    Examples:
        >>> [(box.top, box.left) for box in five_crop_boxes(5, 7, 0.5)]
        [(0, 0), (0, 4), (3, 0), (3, 4), (2, 2)]

    Source: `crop_datasets` of the official STEGO code; there, a crop can have no pixels.
    """
    crop_height, crop_width = max(1, int(ratio * height)), max(1, int(ratio * width))
    bottom, right = height - crop_height, width - crop_width
    corners = [*itertools.product((0, bottom), (0, right)), (round(bottom / 2), round(right / 2))]
    return [Box(top, left, crop_height, crop_width) for top, left in corners]


def random_crop_boxes(height: int, width: int, ratio: float, image_id: int) -> list[Box]:
    """Place five crops at places that look random and are the same in every run.

    The places are shares of the free room, so the label map of an image, if it has another size,
    is cut at the same places.

    Args:
        height: Of the image, pixels.
        width: Of the image, pixels.
        ratio: Side of a crop as in `five_crop_boxes`.
        image_id: What the places are drawn from.

    Returns:
        Five boxes of one size, anywhere inside the image.

    Examples:
        >>> random_crop_boxes(4, 6, 1.0, 7) == 5 * [Box(0, 0, 4, 6)]
        True

    Source: `crop_datasets` of the official STEGO code draws five crops by Python's `hash`; there,
        a crop as large as the image is a division by zero.
    """
    crop_height, crop_width = max(1, int(ratio * height)), max(1, int(ratio * width))
    boxes = []
    for number in range(_RANDOM_CROPS):
        digest = hashlib.sha256(f"crop {number} of {image_id}".encode()).digest()
        down, right = (int.from_bytes(half, "big") for half in (digest[:8], digest[8:16]))
        top = down * (height - crop_height + 1) >> 64
        left = right * (width - crop_width + 1) >> 64
        boxes.append(Box(top, left, crop_height, crop_width))
    return boxes


def tile_starts(size: int, side: int, *, overlap: float) -> list[int]:
    """Place equal tiles along an axis: first and last at the ends, the others evenly between.

    Args:
        size: Of the axis.
        side: Of a tile, at most `size`.
        overlap: Least share of a tile that it has in common with the next, [0, 1).

    Returns:
        Where each tile starts, rising; as few tiles as possible.

    Examples:
        >>> tile_starts(10, 4, overlap=0.25)
        [0, 3, 6]
        >>> tile_starts(4, 4, overlap=0.25)
        [0]
    """
    step = max(1, math.floor(side * (1 - overlap)))
    count = 1 + -(-(size - side) // step)
    return [number * (size - side) // max(1, count - 1) for number in range(count)]


def centre_square(box: Box) -> Box:
    """Find the largest square in the middle of a box.

    Args:
        box: Any box of at least one pixel.

    Returns:
        The square; an odd rest is split by rounding half of it to even, as `CenterCrop` does.

    Examples:
        >>> centre_square(Box(10, 20, 4, 7))
        Box(top=10, left=22, height=4, width=4)
    """
    side = min(box.height, box.width)
    top = box.top + round((box.height - side) / 2)
    left = box.left + round((box.width - side) / 2)
    return Box(top, left, side, side)


def view_boxes(
    height: int,
    width: int,
    *,
    crops: Literal["whole", "five", "random"],
    ratio: float,
    image_id: int | None = None,
) -> list[Box]:
    """Place the square views of an image that training and mining use.

    Args:
        height: Of the image, pixels.
        width: Of the image, pixels.
        crops: `whole`: one view, the centre square; `five`: the centre square of each of
            `five_crop_boxes`, in its order; `random`: that of each of `random_crop_boxes`.
        ratio: Side of a crop as a share of the image's side, (0, 1]; unused for `whole`.
        image_id: Needed for `random`, unused otherwise.

    Returns:
        One or five squares inside the image.

    Raises:
        ValueError: for `random` without an image id.

    Examples:
        >>> view_boxes(4, 6, crops="whole", ratio=0.5)
        [Box(top=0, left=1, height=4, width=4)]
    """
    if crops == "whole":
        return [centre_square(Box(0, 0, height, width))]
    if crops == "random":
        if image_id is None:
            raise ValueError("random crops are drawn from the image's id")
        return [centre_square(box) for box in random_crop_boxes(height, width, ratio, image_id)]
    return [centre_square(box) for box in five_crop_boxes(height, width, ratio)]


def resize_image(
    pixels: NDArray[np.uint8],
    height: int,
    width: int,
    *,
    box: Box | None = None,
    nearest: bool = False,
) -> NDArray[np.uint8]:
    """Crop and resize an image, bilinear with antialiasing.

    Pixels outside the box have no influence: it is cut out first.

    Args:
        pixels: RGB, uint8 (H, W, 3).
        height: Of the result, pixels.
        width: Of the result, pixels.
        box: What to show; the whole image if None.
        nearest: Take the nearest pixel instead, as the official code does (`compat`).

    Returns:
        RGB, uint8 (height, width, 3), never a view of the input.

    Raises:
        ShapeError: if the array is not (H, W, 3) or the box is not inside it.

    Examples:
        >>> resize_image(np.full((8, 8, 3), 7, np.uint8), 2, 4).shape
        (2, 4, 3)

    Source: bilinear where the official code takes the nearest pixel.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ShapeError(f"an image is (H, W, 3), not {pixels.shape}")
    cut = Image.fromarray(cut_box(pixels, box))
    how = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    return np.array(cut.resize((width, height), how))


def resize_labels(
    labels: NDArray[_Label], height: int, width: int, *, box: Box | None = None
) -> NDArray[_Label]:
    """Crop and resize a label map; each pixel takes the label under its centre.

    Args:
        labels: Class or cluster ids, any integer type, (H, W).
        height: Of the result, pixels.
        width: Of the result, pixels.
        box: What to show; the whole map if None.

    Returns:
        Ids of the same type, (height, width), never a view of the input.

    Raises:
        ShapeError: if the array is not (H, W) or the box is not inside it.

    Examples:
        >>> resize_labels(np.array([[1, 2]], np.uint8), 1, 4).tolist()
        [[1, 1, 2, 2]]
    """
    if labels.ndim != 2:
        raise ShapeError(f"a label map is (H, W), not {labels.shape}")
    cut = cut_box(labels, box)
    # The centre of pixel i lies at (i + 1/2) · H / height; in integers it is never off by one.
    rows = (2 * np.arange(height) + 1) * cut.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * cut.shape[1] // (2 * width)
    return cut[np.ix_(rows, columns)]


def cut_box(array: NDArray[_Label], box: Box | None) -> NDArray[_Label]:
    """Return the part of an image or label map inside a box, as a view of it; all of it for None.

    Raises:
        ShapeError: if the box is not inside it.

    Examples:
        >>> cut_box(np.arange(6).reshape(2, 3), Box(0, 1, 2, 1)).tolist()
        [[1], [4]]
    """
    if box is None:
        return array
    top, left, height, width = box
    is_inside = top >= 0 and left >= 0 and top + height <= len(array)
    if not (is_inside and height > 0 and width > 0 and left + width <= array.shape[1]):
        raise ShapeError(f"{box} is not inside an image of {array.shape[0]} x {array.shape[1]}")
    return array[top : top + height, left : left + width]


def _around(ideal: float) -> tuple[int, int]:
    return max(1, math.floor(ideal)), max(1, math.ceil(ideal))

"""The pixels of the square views that mining and training see."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stego_core.config.compat import MineCompat
from stego_core.config.schema import ImageLimits, ViewConfig
from stego_core.errors import InputError
from stego_core.images.decode import ImageFailure, decode_image
from stego_core.images.geometry import (
    Box,
    centre_square,
    cut_box,
    five_crop_boxes,
    random_crop_boxes,
    resize_image,
    view_boxes,
)
from stego_core.storage import fs

_JPEG_QUALITY = 75  # Pillow's default, with which the official code writes its crops


def view_count(config: ViewConfig) -> int:
    """Return how many views each image gives."""
    return 1 if config.crops == "whole" else 5


def cut_view(
    image: NDArray[np.uint8],
    image_id: int,
    crop: int,
    side: int,
    config: ViewConfig,
    compat: MineCompat,
) -> NDArray[np.uint8]:
    """Cut one view out of an image.

    Args:
        image: RGB, uint8 (H, W, 3).
        image_id: What the places of random crops are drawn from.
        crop: Number of the view, from 0 to below `view_count(config)`.
        side: Of the view, pixels.
        config: How views are cut.
        compat: `jpeg_crops` compresses each of five crops as the official code stores them,
            `nearest_images` takes the nearest pixel when resizing.

    Returns:
        RGB, uint8 (side, side, 3).

    Examples:
        >>> cut_view(np.zeros((40, 60, 3), np.uint8), 1, 0, 8, ViewConfig(), MineCompat()).shape
        (8, 8, 3)
    """
    height, width = image.shape[:2]
    if compat.jpeg_crops and config.crops != "whole":
        if config.crops == "five":
            boxes = five_crop_boxes(height, width, config.crop_ratio)
        else:
            boxes = random_crop_boxes(height, width, config.crop_ratio, image_id)
        image = jpeg_round_trip(cut_box(image, boxes[crop]))
        box = centre_square(Box(0, 0, *image.shape[:2]))
    else:
        ratio = config.crop_ratio
        boxes = view_boxes(height, width, crops=config.crops, ratio=ratio, image_id=image_id)
        box = boxes[crop]
    return resize_image(image, side, side, box=box, nearest=compat.nearest_images)


def jpeg_round_trip(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Compress an image as JPEG of quality 75 and decode it again.

    Args:
        pixels: RGB, uint8 (H, W, 3).

    Returns:
        RGB, uint8 (H, W, 3).

    Examples:
        >>> jpeg_round_trip(np.full((8, 8, 3), 128, np.uint8))[0, 0].tolist()
        [128, 128, 128]
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    with Image.open(buffer) as image:
        return np.array(image.convert("RGB"))


@dataclass(frozen=True, slots=True)
class ViewCutter:
    """Reads images that mining could read, and cuts views out of them.

    Attributes:
        side: of a view, pixels.
        config: how views are cut.
        limits: of the decoder.
        compat: what the original does when it cuts them.
    """

    side: int
    config: ViewConfig
    limits: ImageLimits
    compat: MineCompat

    def cut(self, uri: str, image_id: int, crops: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Return some views of an image, uint8 RGB (side, side, 3) each.

        Raises:
            InputError: if the image can't be read any more.
        """
        try:
            image = decode_image(fs.read_bytes(uri), self.limits)
        except FileNotFoundError as error:
            raise InputError(f"{uri} is gone since mining: mine again") from error
        if isinstance(image, ImageFailure):
            raise InputError(f"{uri} has changed since mining ({image.problem}): mine again")
        return [
            cut_view(image, image_id, crop, self.side, self.config, self.compat) for crop in crops
        ]

"""Pixel modes of images, by Pillow's names, and how each becomes RGB."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stego_core.images.tiff import Tiff

GREY_16_MODES: Final = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
LABEL_MODES: Final = GREY_16_MODES | {"1", "L", "P"}
_ALPHA_MODES: Final = frozenset({"LA", "PA", "RGBA"})
IMAGE_MODES: Final = LABEL_MODES | _ALPHA_MODES | {"RGB", "RGBX", "CMYK", "YCbCr"}


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of one of `IMAGE_MODES` as RGB, what is transparent on white."""
    if image.mode in GREY_16_MODES:
        return Image.fromarray(_grey_8(image)).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        rgb = Image.new("RGB", rgba.size, "white")
        rgb.paste(rgba, mask=rgba.getchannel("A"))
        return rgb
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_8(image: Image.Image) -> NDArray[np.uint8]:
    """Scale 16-bit (or a TIFF's 12-bit) grey to 8 bit, (H, W), rounded to the nearest."""
    brightest, is_white_zero = 65535, False
    if isinstance(image, Tiff):
        brightest = 2 ** int(image.tag_v2.get(258, (16,))[0]) - 1
        is_white_zero = image.tag_v2.get(262) == 0  # Pillow inverts only 8-bit grey
    grey = (np.asarray(image).astype(np.uint32) * 255 + brightest // 2) // brightest
    return (255 - grey if is_white_zero else grey).astype(np.uint8)

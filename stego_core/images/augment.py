"""Random changes of a view, and where each place of the changed view comes from.

Colours are changed on uint8 pixels, so before the backbone normalises them; the original changes
normalised values, for which brightness and contrast mean something else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from stego_core.images.geometry import Box, resize_image

# The original's augmentation: torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale and
# GaussianBlur with these numbers, and torchvision's defaults otherwise.
FLIP_SHARE, GREY_SHARE, BLUR_SHARE = 0.5, 0.2, 0.5
CROP_AREA = (0.8, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
JITTER = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1}
BLUR_SIGMA = (0.1, 2.0)
_BLUR_RADIUS = 2  # 5 x 5 pixels
_CROP_TRIES = 10


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is done to one view, in this order.

    Attributes:
        flip: whether it is mirrored left to right.
        box: what is then cut out and resized to the view's size, pixels of the mirrored view.
        jitter: name and strength of the changes of colour, in their order: factors of brightness,
            contrast and saturation, and the shift of the hue in turns of the colour wheel.
        grey: whether colour is taken away.
        blur: standard deviation in pixels; 0 leaves the view sharp.
    """

    flip: bool
    box: Box
    jitter: tuple[tuple[str, float], ...] = ()
    grey: bool = False
    blur: float = 0.0


def draw_augmentation(generator: np.random.Generator, side: int) -> Augmentation:
    """Draw what is done to one square view.

    Args:
        generator: the only source of randomness.
        side: of the view, pixels.

    Examples:
        >>> draw_augmentation(np.random.default_rng(0), 32).box.height <= 32
        True
    """
    flip = bool(generator.random() < FLIP_SHARE)
    box = _draw_box(generator, side)
    names = [list(JITTER)[index] for index in generator.permutation(len(JITTER))]
    strengths = {name: float(generator.uniform(-JITTER[name], JITTER[name])) for name in JITTER}
    jitter = tuple(
        (name, strengths[name] if name == "hue" else 1 + strengths[name]) for name in names
    )
    grey = bool(generator.random() < GREY_SHARE)
    sigma = float(generator.uniform(*BLUR_SIGMA))
    return Augmentation(flip, box, jitter, grey, sigma if generator.random() < BLUR_SHARE else 0.0)


def augment(pixels: NDArray[np.uint8], augmentation: Augmentation) -> NDArray[np.uint8]:
    """Return the augmented view.

    Args:
        pixels: RGB, uint8 (side, side, 3).
        augmentation: what is done to it.

    Returns:
        RGB, uint8 (side, side, 3).

    Raises:
        ShapeError: if the box isn't inside the view.

    Examples:
        >>> view = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
        >>> augment(view, Augmentation(flip=True, box=Box(0, 0, 2, 2)))[0, 0].tolist()
        [3, 4, 5]
    """
    side = len(pixels)
    mirrored = pixels[:, ::-1] if augmentation.flip else pixels
    out = resize_image(np.ascontiguousarray(mirrored), side, side, box=augmentation.box)
    for name, strength in augmentation.jitter:
        out = change_color(out, name, strength)
    if augmentation.grey:
        out = change_color(out, "saturation", 0.0)
    return _blurred(out, augmentation.blur) if augmentation.blur else out


def source_coords(
    augmentation: Augmentation, side: int, height: int, width: int
) -> NDArray[np.float64]:
    """Return where in the view each cell of the augmented view's grid comes from.

    Args:
        augmentation: what was done to the view.
        side: of the view, pixels.
        height: of the grid, cells.
        width: of the grid, cells.

    Returns:
        (x, y), (height, width, 2); -1 and 1 are the outer edges of the view, as
        `grid_sample(align_corners=False)` takes them.

    Examples:
        >>> source_coords(Augmentation(flip=True, box=Box(0, 0, 8, 8)), 8, 1, 2)[..., 0].tolist()
        [[0.5, -0.5]]
    """
    top, left, box_height, box_width = augmentation.box
    y = (top + (np.arange(height) + 0.5) / height * box_height) / side
    x = (left + (np.arange(width) + 0.5) / width * box_width) / side
    if augmentation.flip:
        x = 1 - x
    return np.stack(np.meshgrid(2 * x - 1, 2 * y - 1), axis=-1)


def change_color(pixels: NDArray[np.uint8], name: str, strength: float) -> NDArray[np.uint8]:
    """Change one property of the colours, as torchvision does to Pillow images.

    Args:
        pixels: RGB, uint8 (H, W, 3).
        name: `brightness`, `contrast`, `saturation` (factors, 1 changes nothing) or `hue` (turns
            of the colour wheel, 0 changes nothing).
        strength: as said.

    Returns:
        RGB, uint8 (H, W, 3).

    Examples:
        >>> change_color(np.full((1, 1, 3), 100, np.uint8), "brightness", 0.5).tolist()
        [[[50, 50, 50]]]
    """
    image = Image.fromarray(pixels)
    if name == "hue":
        hsv = np.array(image.convert("HSV"))
        hsv[..., 0] += np.uint8(round(strength * 255) % 256)
        return np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    enhancers = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    return np.array(enhancers[name](image).enhance(strength))


def _draw_box(generator: np.random.Generator, side: int) -> Box:
    for _ in range(_CROP_TRIES):
        area = side * side * generator.uniform(*CROP_AREA)
        aspect = math.exp(generator.uniform(*np.log(CROP_ASPECT)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= side and 0 < height <= side:
            top = int(generator.integers(side - height + 1))
            left = int(generator.integers(side - width + 1))
            return Box(top, left, height, width)
    return Box(0, 0, side, side)


def _blurred(pixels: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    steps = np.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    out = pixels.astype(np.float64)
    for axis in (0, 1):
        width = [(_BLUR_RADIUS, _BLUR_RADIUS) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(out, width, mode="reflect")
        length = out.shape[axis]
        out = sum(
            weight * padded.take(range(start, start + length), axis)
            for start, weight in enumerate(weights)
        )
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)

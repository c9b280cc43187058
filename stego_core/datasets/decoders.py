"""How files become pixels here: functions that the caller hands in.

The decoder lies in `stego_core.images`, a neighbour of this package that it may not import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stego_core.config.schema import ImageLimits
from stego_core.errors import InputError


class Unreadable(Protocol):
    """What a decoder returns instead of pixels."""

    @property
    def detail(self) -> str:
        """Why, in one line."""
        ...


Decode: TypeAlias = Callable[[bytes], NDArray[Any] | Unreadable]


@dataclass(frozen=True, slots=True)
class Decoders:
    """The ways to decode, under one set of limits.

    Attributes:
        image: bytes of a file to RGB, uint8 (H, W, 3).
        label: bytes of a PNG to class ids, uint8 or uint16 (H, W).
        size: bytes of an image to height and width of what `image` would return.
        limits: what is decoded at all.
    """

    image: Decode
    label: Decode
    size: Callable[[bytes], tuple[int, int] | Unreadable]
    limits: ImageLimits

    def read_image(self, data: bytes) -> NDArray[np.uint8]:
        """Return RGB, uint8 (H, W, 3).

        Raises:
            InputError: if the file can't be decoded.
        """
        return self._read(self.image, data)

    def read_label(self, data: bytes) -> NDArray[Any]:
        """Return the stored ids, (H, W).

        Raises:
            InputError: if the file can't be decoded.
        """
        return self._read(self.label, data)

    def _read(self, decode: Decode, data: bytes) -> NDArray[Any]:
        pixels = decode(data)
        if not isinstance(pixels, np.ndarray):
            raise InputError(pixels.detail)
        return pixels

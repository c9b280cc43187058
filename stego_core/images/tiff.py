"""What a TIFF needs beyond Pillow: limits that its header can get round, and missing bytes."""

from __future__ import annotations

import io

from PIL import Image, TiffImagePlugin


class Source(io.BytesIO):
    """The bytes of a file, remembering whether more was asked of them than there is."""

    ran_out = False

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to `size` bytes."""
        chunk = super().read(size)
        if size is not None and size > len(chunk):
            self.ran_out = True
        return chunk


class Tiff(TiffImagePlugin.TiffImageFile):
    """A TIFF without Pillow's process-wide limit."""

    def load_prepare(self) -> None:
        """Allocate the pixels."""
        # Pillow allocates here only if nothing is there yet, and then applies its own limit.
        self.im = Image.new(self.mode, (self.tag_v2[256], self.tag_v2[257]), None).im
        super().load_prepare()


def tile_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of the tiles of a TIFF, in pixels; (0, 0) of anything else.

    libtiff decodes a tile as a whole, and a tile may be any number of times larger than the image.
    """
    if not isinstance(image, Tiff):
        return 0, 0
    return _largest(image.tag_v2.get(322)), _largest(image.tag_v2.get(323))


def _largest(value: object) -> int:
    # libtiff takes the tag as a whole number of any width, or a float; a damaged one holds several.
    try:
        return max(int(number) for number in (value if isinstance(value, tuple) else (value,)))
    except (TypeError, ValueError, OverflowError):
        return 0


def is_short(image: Image.Image, source: object) -> bool:
    """Tell whether strips or tiles lie beyond the end of the file (libtiff doesn't say)."""
    if not (isinstance(image, Tiff) and isinstance(source, Source)):
        return False
    tags = image.tag_v2
    offsets, sizes = (tags.get(273, tags.get(324, ())), tags.get(279, tags.get(325, ())))
    ends = (start + size for start, size in zip(offsets, sizes, strict=False))
    return max(ends, default=0) > len(source.getbuffer())

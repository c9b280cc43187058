"""Image files made with Pillow or by hand, for the tests of this folder."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from stego_core.config.schema import ImageLimits
from stego_core.images.decode import ImageFailure

LIMITS = ImageLimits(min_side=1)
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (12, 20), dtype=np.uint8)
# Large flat areas, so that lossy formats keep the colours of each.
QUARTERS = np.zeros((32, 48, 3), np.uint8)
QUARTERS[:16, :24] = (200, 30, 30)
QUARTERS[:16, 24:] = (30, 180, 30)
QUARTERS[16:, :24] = (30, 30, 220)
QUARTERS[16:, 24:] = (240, 240, 60)


def encoded(image, image_format, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_chunk(kind, payload):
    body = kind + payload
    return struct.pack(">I", len(payload)) + body + struct.pack(">I", zlib.crc32(body))


def png(width, height, *, depth, colour, data, before=b""):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + before + data + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def png_rows(rows):
    return png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))


def tiff(width, height, *, bits, photometric, data):
    """A little-endian TIFF of one uncompressed grey strip."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric)]
    tags += [(273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, height), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0" + data


def problem_of(result):
    assert isinstance(result, ImageFailure), "an image came out"
    assert result.detail
    assert "\n" not in result.detail
    assert len(result.detail) <= 200
    return result.problem

"""What can not be decoded comes back as the right problem, never as an exception."""

import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
from image_files import COLOUR, LIMITS, RNG, encoded, png, png_chunk, problem_of, tiff
from PIL import Image, ImageFile, PngImagePlugin

from stego_core.config.schema import ImageLimits
from stego_core.errors import ImageProblem
from stego_core.images.decode import ACCEPTED_FORMATS, decode_image


def test_no_bytes_are_empty():
    assert problem_of(decode_image(b"", LIMITS)) is ImageProblem.EMPTY


@pytest.mark.parametrize(
    "data", [b"this is a text called photo.jpg", b"<!DOCTYPE html><html>", bytes(100), b"BMW cars"]
)
def test_other_files_are_not_images(data):
    assert problem_of(decode_image(data, LIMITS)) is ImageProblem.NOT_AN_IMAGE


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encoded(COLOUR, "GIF"), "GIF"),
        (encoded(COLOUR, "PPM"), "PPM"),
        (encoded(COLOUR, "ICO"), "ICO"),
        (encoded(COLOUR, "JPEG2000"), "JPEG 2000"),
        (encoded(COLOUR, "AVIF"), "AVIF"),
        (encoded(COLOUR, "EPS"), "EPS"),
        (encoded(COLOUR, "PDF"), "PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "MP4"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "SVG"),
        (b"GIF89a", "GIF"),
    ],
)
def test_known_formats_that_are_not_accepted_are_named(data, name):
    result = decode_image(data, LIMITS)
    assert problem_of(result) is ImageProblem.UNSUPPORTED_FORMAT
    assert name in result.detail
    assert all(accepted in result.detail for accepted in ACCEPTED_FORMATS)


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("TIFF", {"compression": "jpeg"}),
        ("BMP", {}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_file_cut_anywhere_is_truncated(image_format, options):
    noise = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    data = encoded(noise, image_format, **options)
    # Some bytes of padding or an end mark at the very end may be missing without harm.
    for length in [*range(18, 200, 7), *range(200, len(data) - 32, 173), len(data) - 33]:
        problem = problem_of(decode_image(data[:length], LIMITS))
        assert problem is ImageProblem.TRUNCATED, f"{length} of {len(data)} bytes: {problem}"


def test_a_compressed_tiff_whose_strips_are_cut_off_is_truncated():
    # As cloud-optimised GeoTIFF: header first, so that only pixels are missing.
    strip = zlib.compress(RNG.integers(0, 256, 4096, dtype=np.uint8).tobytes())
    plain = tiff(64, 64, bits=8, photometric=1, data=strip)
    data = plain.replace(struct.pack("<HHII", 259, 4, 1, 1), struct.pack("<HHII", 259, 4, 1, 8))
    assert decode_image(data, LIMITS).shape == (64, 64, 3)
    assert problem_of(decode_image(data[:-2000], LIMITS)) is ImageProblem.TRUNCATED


def test_damage_inside_a_complete_file_is_not_called_truncated():
    data = bytearray(encoded(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), "PNG"))
    data[2000:2100] = bytes(100)
    result = decode_image(bytes(data), LIMITS)
    assert problem_of(result) is ImageProblem.NOT_AN_IMAGE


def test_truncated_images_are_not_filled_up():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_lack_of_memory_is_a_failure_and_not_an_exception(monkeypatch):
    def without_memory(self):
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", without_memory)
    result = decode_image(encoded(COLOUR, "PNG"), LIMITS)
    assert problem_of(result) is ImageProblem.TOO_MANY_PIXELS
    assert "memory" in result.detail


def huge_png(side):
    """A complete 1-bit PNG of side x side black pixels, about a thousandth of its pixels' size."""
    deflate = zlib.compressobj()
    row = bytes(1 + (side + 7) // 8) * 100
    packed = b"".join(deflate.compress(row) for _ in range(side // 100)) + deflate.flush()
    return png(side, side, depth=1, colour=0, data=png_chunk(b"IDAT", packed))


def test_a_huge_png_is_refused_by_its_header_without_taking_memory():
    data = huge_png(30_000)
    assert len(data) < 200_000
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = decode_image(data, ImageLimits())
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert problem_of(result) is ImageProblem.TOO_MANY_PIXELS
    assert "30000 x 30000" in result.detail
    assert grown_kib < 20_000  # decoded, it would be 900 000


def test_limits_are_checked_before_pixels_are_looked_at():
    header_only = png(30_000, 30_000, depth=8, colour=2, data=b"")
    assert problem_of(decode_image(header_only, ImageLimits())) is ImageProblem.TOO_MANY_PIXELS
    without_pixels = png(30, 30, depth=8, colour=2, data=b"")
    assert problem_of(decode_image(without_pixels, ImageLimits())) is ImageProblem.NOT_AN_IMAGE


def test_too_many_bytes_come_before_everything_but_emptiness():
    limits = ImageLimits(max_bytes=10)
    assert problem_of(decode_image(b"GIF89a" * 10, limits)) is ImageProblem.TOO_MANY_BYTES
    assert problem_of(decode_image(b"GIF89a", limits)) is ImageProblem.UNSUPPORTED_FORMAT


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        (ImageLimits(max_pixels=239, max_side=5, min_side=50), ImageProblem.TOO_MANY_PIXELS),
        (ImageLimits(max_side=19, min_side=50), ImageProblem.TOO_LONG_SIDE),
        (ImageLimits(min_side=13), ImageProblem.TOO_SMALL),
    ],
)
def test_pixels_are_checked_before_the_long_side_and_that_before_the_short(limits, problem):
    assert problem_of(decode_image(encoded(COLOUR, "PNG"), limits)) is problem


def test_limits_are_inclusive():
    limits = ImageLimits(max_pixels=240, max_side=20, min_side=12)
    assert decode_image(encoded(COLOUR, "PNG"), limits).shape == (12, 20, 3)


def test_one_pixel_is_too_small():
    data = encoded(COLOUR[:1, :1], "PNG")
    assert problem_of(decode_image(data, ImageLimits())) is ImageProblem.TOO_SMALL


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "BMP"])
def test_pillows_own_limit_neither_matters_nor_changes_nor_warns(image_format, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data = encoded(COLOUR, image_format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data, LIMITS).shape == COLOUR.shape
    assert Image.MAX_IMAGE_PIXELS == 10


def test_webp_beyond_pillows_own_limit_is_reported_as_too_many_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert problem_of(decode_image(encoded(COLOUR, "WEBP"), LIMITS)) is ImageProblem.TOO_MANY_PIXELS

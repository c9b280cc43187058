"""Images come out upright, whatever their EXIF data are like."""

import struct

import numpy as np
import pytest
from image_files import COLOUR, GREY, LIMITS, QUARTERS, encoded, tiff
from PIL import Image

from stego_core.images.decode import decode_image

UPRIGHT = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: np.swapaxes(stored, 0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(np.swapaxes(stored, 0, 1), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(image_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(COLOUR, image_format, exif=exif, **options)
    pixels = decode_image(data, LIMITS)
    np.testing.assert_array_equal(pixels, UPRIGHT[orientation](COLOUR))
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_jpeg_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_image(encoded(QUARTERS, "JPEG", quality=95, exif=exif), LIMITS)
    expected = UPRIGHT[orientation](QUARTERS)
    assert pixels.shape == expected.shape
    rows, columns = expected.shape[0] // 4, expected.shape[1] // 4
    for row, column in [(rows, columns), (rows, 3 * columns), (3 * rows, columns)]:
        assert np.abs(pixels[row, column].astype(int) - expected[row, column]).max() <= 6


def test_sixteen_bit_grey_is_turned_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.arange(240, dtype=np.uint16).reshape(12, 20) * 257
    pixels = decode_image(encoded(values, "PNG", exif=exif), LIMITS)
    np.testing.assert_array_equal(pixels[..., 0], np.rot90(values // 257, -1))


GARBAGE = [b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0II*\0\xff\xff\xff\xff", b"x"]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore")
def test_exif_garbage_does_not_fail_an_image(image_format, garbage):
    data = encoded(COLOUR, image_format, exif=garbage)
    assert decode_image(data, LIMITS).shape == COLOUR.shape


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_means_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(encoded(COLOUR, "PNG", exif=exif), LIMITS), COLOUR)


@pytest.mark.filterwarnings("ignore")
def test_a_tiff_whose_exif_block_lies_nowhere_is_still_read():
    plain = tiff(20, 12, bits=8, photometric=1, data=GREY.tobytes())
    samples = struct.pack("<HHII", 277, 4, 1, 1)
    exif_block = struct.pack("<HHII", 0x8769, 4, 1, 2**31)
    assert samples in plain
    pixels = decode_image(plain.replace(samples, exif_block), LIMITS)
    np.testing.assert_array_equal(pixels[..., 0], GREY)

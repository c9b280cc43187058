"""Labels keep the numbers that the file stores."""

import numpy as np
import pytest
from image_files import GREY, LIMITS, RNG, encoded, png, png_chunk, png_rows, problem_of
from PIL import Image

from stego_core.config.schema import ImageLimits
from stego_core.errors import ImageProblem
from stego_core.images.decode import decode_label


def test_labels_of_eight_bits_keep_their_numbers():
    ids = decode_label(encoded(GREY, "PNG"), LIMITS)
    assert ids.dtype == np.uint8
    np.testing.assert_array_equal(ids, GREY)


def test_labels_with_a_palette_are_its_indices():
    image = Image.fromarray(GREY, "P")
    image.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
    for options in ({}, {"transparency": 3}):
        np.testing.assert_array_equal(decode_label(encoded(image, "PNG", **options), LIMITS), GREY)


def test_labels_of_sixteen_bits_keep_their_numbers():
    values = (np.arange(240, dtype=np.uint16) * 273).reshape(12, 20)
    ids = decode_label(encoded(values, "PNG"), LIMITS)
    assert ids.dtype == np.uint16
    np.testing.assert_array_equal(ids, values)


@pytest.mark.parametrize("colour", [0, 3])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_labels_of_few_bits_are_counted_from_zero(depth, colour):
    per_byte = 8 // depth
    values = np.arange(4 * per_byte).reshape(4, per_byte) % 2**depth
    packed = [sum(int(v) << 8 - depth * (i + 1) for i, v in enumerate(row)) for row in values]
    palette = png_chunk(b"PLTE", bytes(range(3 * 2**depth))) if colour == 3 else b""
    rows = png_rows([bytes([byte]) for byte in packed])
    data = png(per_byte, 4, depth=depth, colour=colour, before=palette, data=rows)
    ids = decode_label(data, LIMITS)
    assert ids.dtype == np.uint8
    np.testing.assert_array_equal(ids, values)


def test_labels_are_turned_as_their_exif_data_say():
    exif = Image.Exif()
    exif[0x0112] = 8
    ids = decode_label(encoded(GREY, "PNG", exif=exif), LIMITS)
    np.testing.assert_array_equal(ids, np.rot90(GREY))
    assert ids.flags.c_contiguous


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_labels_of_several_channels_are_refused_by_name(mode):
    result = decode_label(encoded(Image.new(mode, (16, 16)), "PNG"), LIMITS)
    assert problem_of(result) is ImageProblem.UNSUPPORTED_MODE
    assert f"{mode} pixels, not one channel of class ids" in result.detail


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "GIF"])
def test_labels_that_are_not_png_are_refused(image_format):
    result = decode_label(encoded(GREY, image_format), LIMITS)
    assert problem_of(result) is ImageProblem.UNSUPPORTED_FORMAT


def test_labels_have_the_limits_of_images():
    data = encoded(GREY, "PNG")
    assert problem_of(decode_label(data, ImageLimits(max_pixels=9))) is ImageProblem.TOO_MANY_PIXELS
    assert problem_of(decode_label(data[:150], LIMITS)) is ImageProblem.TRUNCATED

"""The pixels that come out of each format, mode and kind of file."""

import io
import struct

import numpy as np
import pytest
from image_files import COLOUR, GREY, LIMITS, QUARTERS, encoded, png, png_rows, problem_of, tiff
from PIL import Image

from stego_core.errors import ImageProblem
from stego_core.images.decode import decode_image


def on_white(colour, alpha):
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"big_tiff": True}),
    ],
)
def test_lossless_formats_give_back_the_very_pixels(image_format, options):
    pixels = decode_image(encoded(COLOUR, image_format, **options), LIMITS)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, COLOUR)


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("WEBP", {"quality": 95}),
        ("TIFF", {"compression": "jpeg", "quality": 95}),
    ],
)
def test_lossy_formats_keep_flat_colours(image_format, options):
    pixels = decode_image(encoded(QUARTERS, image_format, **options), LIMITS)
    for row, column in [(8, 12), (8, 36), (24, 12), (24, 36)]:
        difference = pixels[row, column].astype(int) - QUARTERS[row, column]
        assert np.abs(difference).max() <= 6  # the loss of quality 95 on flat areas


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "BMP", "TIFF"])
def test_grey_becomes_three_equal_channels(image_format):
    flat = np.full((16, 16), 77, np.uint8)
    pixels = decode_image(encoded(flat, image_format), LIMITS)
    np.testing.assert_array_equal(pixels, np.full((16, 16, 3), 77))


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF"])
def test_one_bit_images_become_black_and_white(image_format):
    bits = GREY > 127
    pixels = decode_image(encoded(Image.fromarray(bits), image_format), LIMITS)
    np.testing.assert_array_equal(pixels, np.repeat(bits[..., None] * 255, 3, axis=2))


@pytest.mark.parametrize(("image_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_transparency_is_composited_on_white(image_format, options):
    rgba = np.dstack([COLOUR, GREY])
    rgba[:, :5, 3], rgba[:, 5:10, 3] = 0, 255
    options = {**options, "exact": True} if image_format == "WEBP" else options
    pixels = decode_image(encoded(rgba, image_format, **options), LIMITS)
    assert np.all(pixels[:, :5] == 255)
    np.testing.assert_array_equal(pixels[:, 5:10], COLOUR[:, 5:10])
    np.testing.assert_allclose(pixels, on_white(COLOUR, rgba[..., 3]), atol=1)


def test_grey_with_alpha_is_composited_on_white():
    image = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())])
    expected = on_white(np.repeat(GREY[..., None], 3, axis=2), GREY[::-1])
    np.testing.assert_allclose(decode_image(encoded(image, "PNG"), LIMITS), expected, atol=1)


def test_palette_images_show_their_colours_and_their_transparency():
    image = Image.fromarray(np.arange(240, dtype=np.uint8).reshape(12, 20) % 3, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    opaque = decode_image(encoded(image, "PNG"), LIMITS)
    np.testing.assert_array_equal(opaque[0, :3], [[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    with_hole = decode_image(encoded(image, "PNG", transparency=1), LIMITS)
    np.testing.assert_array_equal(with_hole[0, :3], [[255, 0, 0], [255, 255, 255], [0, 0, 255]])


def test_a_transparent_colour_of_an_rgb_png_becomes_white():
    colour = COLOUR.copy()
    colour[3, 4] = (1, 2, 3)
    pixels = decode_image(encoded(colour, "PNG", transparency=(1, 2, 3)), LIMITS)
    colour[3, 4] = 255
    np.testing.assert_array_equal(pixels, colour)


def test_adobe_cmyk_jpeg_has_the_right_way_round_of_ink():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow ink: red
    data = encoded(cmyk, "JPEG", quality=95)
    assert b"Adobe" in data
    red = decode_image(data, LIMITS)[8, 8].astype(int)
    assert np.abs(red - (255, 0, 0)).max() <= 4


def test_cmyk_tiff_is_converted():
    cmyk = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert decode_image(encoded(cmyk, "TIFF"), LIMITS)[8, 8].tolist() == [0, 255, 255]


def test_ycbcr_tiff_is_converted():
    image = Image.fromarray(QUARTERS).convert("YCbCr")
    pixels = decode_image(encoded(image, "TIFF"), LIMITS)
    assert np.abs(pixels.astype(int) - QUARTERS).max() <= 3  # rounding of the colour conversion


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(image_format):
    values = np.array([[0, 128, 129, 257, 300, 32768, 65406, 65407, 65535]], np.uint16)
    pixels = decode_image(encoded(values, image_format), LIMITS)
    expected = [round(int(value) / 257) for value in values[0]]
    assert expected == [0, 0, 1, 1, 1, 128, 254, 255, 255]
    np.testing.assert_array_equal(pixels[0], np.repeat(np.array(expected)[:, None], 3, axis=1))


def test_big_endian_sixteen_bit_tiff_is_read_in_its_own_byte_order():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    little = tiff(8, 8, bits=16, photometric=1, data=values.tobytes())
    tags = [struct.unpack_from("<HHII", little, 10 + 12 * i) for i in range(9)]
    entries = b"".join(struct.pack(">HHII", *tag) for tag in tags)
    big = b"MM\0*" + struct.pack(">IH", 8, 9) + entries + bytes(4) + values.byteswap().tobytes()
    np.testing.assert_array_equal(decode_image(big, LIMITS), decode_image(little, LIMITS))


def test_twelve_bit_tiff_uses_its_own_full_scale():
    # Two pixels in three bytes: 0xFFF and 0x800.
    data = tiff(8, 8, bits=12, photometric=1, data=b"\xff\xf8\x00" * 32)
    assert decode_image(data, LIMITS)[0, :2, 0].tolist() == [255, 128]


def test_tiff_whose_zero_is_white_is_inverted():
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    normal = decode_image(tiff(8, 8, bits=16, photometric=1, data=grey.tobytes()), LIMITS)
    inverted = decode_image(tiff(8, 8, bits=16, photometric=0, data=grey.tobytes()), LIMITS)
    np.testing.assert_array_equal(inverted, 255 - normal)


def test_sixteen_bit_colour_png_keeps_its_high_bytes():
    rows = [struct.pack(">6H", 0x1234, 0xFFFF, 0, 0x8000, 0x00FF, 0xABCD)] * 2
    data = png(2, 2, depth=16, colour=2, data=png_rows(rows))
    assert decode_image(data, LIMITS)[1].tolist() == [[0x12, 0xFF, 0], [0x80, 0, 0xAB]]


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_modes_without_a_fixed_range_are_named_and_refused(mode):
    result = decode_image(encoded(Image.new(mode, (16, 16)), "TIFF"), LIMITS)
    assert problem_of(result) is ImageProblem.UNSUPPORTED_MODE
    assert mode in result.detail


def test_a_tiff_of_five_bands_is_an_unsupported_mode():
    data = tiff(8, 8, bits=8, photometric=1, data=bytes(64 * 5)).replace(
        struct.pack("<HHII", 277, 4, 1, 1), struct.pack("<HHII", 277, 4, 1, 5)
    )
    assert problem_of(decode_image(data, LIMITS)) is ImageProblem.UNSUPPORTED_MODE


def test_icc_profiles_change_nothing():
    data = encoded(COLOUR, "PNG", icc_profile=b"not even a profile")
    np.testing.assert_array_equal(decode_image(data, LIMITS), COLOUR)


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("WEBP", {"lossless": True}), ("TIFF", {}), ("PNG", {}), ("MPO", {"quality": 95})],
)
def test_the_first_frame_of_several_is_taken(image_format, options):
    frames = [Image.new("RGB", (32, 24), colour) for colour in ["red", "lime", "blue"]]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 3
    pixels = decode_image(data, LIMITS)
    assert pixels.shape == (24, 32, 3)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 2

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from stego_core.masks.codec import decode_mask, encode_mask
from stego_core.masks.palette import cluster_colors
from stego_core.viz.overlay import colorize, mask_image


def opened(data):
    return Image.open(io.BytesIO(data))


def test_a_viewer_sees_the_cluster_colours_and_a_reader_the_ids():
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = opened(encode_mask(labels))
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), labels)
    shown = np.asarray(image.convert("RGB")).reshape(256, 3)
    np.testing.assert_array_equal(shown[:255], cluster_colors(255))


def test_a_pixel_without_a_cluster_is_mid_grey():
    image = opened(encode_mask(np.full((2, 2), 255, np.uint8)))
    assert image.convert("RGB").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("count", [1, 27, 255])
def test_masks_overlays_and_reports_show_the_same_colours(count):
    labels = np.append(np.arange(count), 255).astype(np.uint8)[None]
    colors = cluster_colors(count)
    stored = np.asarray(opened(encode_mask(labels)).convert("RGB"))
    np.testing.assert_array_equal(stored, colorize(labels, colors))
    np.testing.assert_array_equal(stored, np.asarray(mask_image(labels, colors).convert("RGB")))


def test_more_clusters_than_a_byte_holds_are_16_bit_grey():
    labels = np.array([[0, 255, 256], [1000, 65534, 65535]], np.uint16)
    data = encode_mask(labels)
    assert opened(data).mode.startswith("I;16")
    np.testing.assert_array_equal(decode_mask(data), labels)
    assert decode_mask(data).dtype == np.uint16


def test_small_ids_in_16_bits_stay_16_bits():
    labels = np.array([[1, 2]], np.uint16)
    assert decode_mask(encode_mask(labels)).dtype == np.uint16


def test_only_png_is_decoded():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(buffer, "BMP")
    with pytest.raises(OSError, match="cannot identify"):
        decode_mask(buffer.getvalue())


def test_a_map_of_two_halves_takes_few_bytes():
    labels = np.zeros((320, 320), np.uint8)
    labels[:, 160:] = 3
    assert len(encode_mask(labels)) < 2500  # of which the palette is 768

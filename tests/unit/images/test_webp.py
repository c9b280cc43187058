"""The size of a WebP is known before libwebp makes room for its canvas."""

import io

import numpy as np
import pytest
from image_files import LIMITS
from PIL import Image

from stego_core.config.schema import ImageLimits
from stego_core.errors import ImageProblem
from stego_core.images import decode
from stego_core.images.decode import ImageFailure, decode_image
from stego_core.images.webp import webp_size

KINDS = {
    b"VP8 ": ("RGB", {"quality": 50}),
    b"VP8L": ("RGB", {"lossless": True}),
    b"VP8X": ("RGBA", {"quality": 50}),
}


def webp(kind: bytes, width: int, height: int) -> bytes:
    mode, options = KINDS[kind]
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), np.uint8)
    Image.fromarray(noise, mode).save(buffer, "WEBP", **options)
    assert buffer.getvalue()[12:16] == kind
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (255, 256), (1025, 2), (7, 16383)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_header_states_the_size_that_pillow_finds(kind, size):
    data = webp(kind, *size)
    with Image.open(io.BytesIO(data)) as image:
        assert webp_size(data) == image.size == size


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_pixels_are_refused_before_the_file_is_opened(kind, monkeypatch):
    monkeypatch.setitem(decode._PLUGINS, "WEBP", pytest.fail)
    found = decode_image(webp(kind, 40, 30), ImageLimits(max_pixels=1199))
    assert isinstance(found, ImageFailure)
    assert found.problem is ImageProblem.TOO_MANY_PIXELS
    assert found.detail == "40 x 30 pixels; limit 1199"


@pytest.mark.parametrize("kind", KINDS)
def test_a_header_that_is_cut_or_damaged_states_no_size(kind):
    data = webp(kind, 40, 30)
    assert all(webp_size(data[:end]) is None for end in range(30))
    assert webp_size(data[:12] + b"ALPH" + data[16:]) is None
    assert decode_image(data, LIMITS).shape == (30, 40, 3)

"""Whatever the bytes, decoding returns an image or a reason."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stego_core.config.schema import ImageLimits
from stego_core.errors import ImageProblem
from stego_core.images.decode import ImageFailure, decode_image, decode_label

LIMITS = ImageLimits(max_pixels=10_000, min_side=1)
SIGNATURES = [
    b"",
    b"\xff\xd8\xff\xe0",
    b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR",
    b"RIFF\x40\0\0\0WEBPVP8X",
    b"II*\0\x08\0\0\0",
    b"MM\0*\0\0\0\x08",
    b"BM\x40\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0",
]


def sample(image_format):
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    options = {} if image_format == "BMP" else {"exif": exif}
    Image.fromarray(noise).save(buffer, image_format, **options)
    return buffer.getvalue()


SAMPLES = [sample(image_format) for image_format in ("JPEG", "PNG", "WEBP", "TIFF", "BMP")]


def assert_is_an_answer(result, *, num_dims):
    if isinstance(result, ImageFailure):
        assert result.problem in ImageProblem
        assert result.problem is not ImageProblem.OK
        assert 0 < len(result.detail) <= 200
        assert "\n" not in result.detail
    else:
        assert result.ndim == num_dims
        assert result.shape[0] * result.shape[1] <= LIMITS.max_pixels


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(SIGNATURES), st.binary(max_size=300))
def test_random_bytes_never_raise(signature, rest):
    assert_is_an_answer(decode_image(signature + rest, LIMITS), num_dims=3)
    assert_is_an_answer(decode_label(signature + rest, LIMITS), num_dims=2)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300)
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=20),
    st.floats(0.1, 1.0),
)
def test_damaged_files_never_raise(data, changes, kept):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * len(data))] = value
    assert_is_an_answer(decode_image(bytes(damaged[: int(kept * len(data))]), LIMITS), num_dims=3)

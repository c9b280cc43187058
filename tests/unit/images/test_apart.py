"""Decoding in a child: the same pixels as here, and a failure where the child ends."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from factories import png_bytes
from image_files import COLOUR, GREY, LIMITS, encoded
from PIL import Image

from stego_core.child import Child
from stego_core.config.schema import ImageLimits
from stego_core.errors import ClusterError, ImageProblem
from stego_core.images import apart
from stego_core.images.apart import ApartDecoder
from stego_core.images.decode import ImageFailure, decode_image, decode_label, upright_size


@pytest.fixture(scope="module")
def decoder():
    return ApartDecoder(LIMITS)


def _deadly():
    """What the children of some tests run instead of the decoders."""

    def answer(request):
        if request.endswith(b"die"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if request.endswith(b"hang"):
            time.sleep(3600)
        return b'{"type": "|u1", "shape": [1, 2]}\n\1\n'

    return answer


@pytest.fixture
def deadly():
    decoder = ApartDecoder(LIMITS)
    decoder._idle.get_nowait()
    decoder._idle.put(Child(_deadly))
    return decoder


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_the_pixels_are_those_of_the_decoder(image_format, decoder):
    data = encoded(COLOUR, image_format)
    found = decoder.image(data)
    np.testing.assert_array_equal(found, decode_image(data, LIMITS))
    assert (found.dtype, found.flags.writeable) == (np.uint8, True)
    assert decoder.size(data) == COLOUR.shape[:2]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_labels_keep_their_type(kind, decoder):
    data = png_bytes(np.arange(12, dtype=kind).reshape(3, 4))
    limits = ImageLimits(min_side=1)
    found = ApartDecoder(limits).label(data)
    np.testing.assert_array_equal(found, decode_label(data, limits))
    assert found.dtype == kind


@pytest.mark.parametrize("data", [b"", b"text", encoded(GREY, "PNG")[:20], b"GIF89a"])
def test_failures_are_those_of_the_decoder(data, decoder):
    assert decoder.image(data) == decode_image(data, LIMITS)
    assert decoder.label(data) == decode_label(data, LIMITS)
    assert decoder.size(data) == upright_size(data, LIMITS)
    assert isinstance(decoder.size(data), ImageFailure)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_is_that_of_the_upright_image(image_format, orientation, decoder):
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(COLOUR, image_format, exif=exif)
    assert decoder.size(data) == decoder.image(data).shape[:2]


def test_a_file_that_ends_or_stops_the_child_is_a_failure_and_the_next_is_decoded(deadly):
    assert deadly.image(b"x").tolist() == [[1, 10]]
    dead = deadly.label(b"die")
    assert dead == ImageFailure(ImageProblem.CRASHED, "the process that decoded it ended: SIGSEGV")
    hasty = ApartDecoder(ImageLimits(max_seconds=0.3))
    hasty._idle = deadly._idle  # a limit for this file alone: the others may wait for a processor
    late = hasty.size(b"hang")
    assert late == ImageFailure(ImageProblem.TIMED_OUT, "decoding took more than 0.3 s")
    assert deadly.image(b"x").tolist() == [[1, 10]]


@pytest.mark.parametrize("at_once", [1, 3])
def test_threads_share_the_children_and_get_their_own_answers(at_once):
    decoder = ApartDecoder(LIMITS, at_once=at_once)
    widths = [16 + n for n in range(40)]
    files = [encoded(np.full((16, width, 3), width, np.uint8), "PNG") for width in widths]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(decoder.image, files))
    assert [image.shape for image in found] == [(16, width, 3) for width in widths]
    assert [int(image[0, 0, 0]) for image in found] == widths


def running(decoder):
    """The process of a decoder that has one child."""
    child = decoder._idle.get_nowait()
    decoder._idle.put(child)
    return child.ready()[0]


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="told by Linux")
def test_a_child_may_take_what_the_limits_state():
    sizes = []
    for max_pixels in (10**6, 10**8):
        limits = ImageLimits(max_pixels=max_pixels, max_bytes=1000)
        assert apart.stated_memory(limits) == 24 * max_pixels + 2000
        decoder = ApartDecoder(limits)
        lines = Path(f"/proc/{running(decoder).pid}/limits").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("Max data size")]
        sizes.append(int(line.split()[3]))
    assert sizes[1] - sizes[0] == pytest.approx(24 * 99 * 10**6, rel=0.01)


def test_a_child_ends_with_its_decoder():
    decoder = ApartDecoder(ImageLimits())
    process = running(decoder)
    assert process.poll() is None
    del decoder
    assert process.returncode == -signal.SIGKILL


def test_a_child_that_goes_with_its_pipe_closes_no_other_file(tmp_path):
    child = Child(_deadly)
    process, pipe = child.ready()
    pipe.__del__()  # what garbage collection may do first, without marking the pipe as closed
    with ExitStack() as stack:
        files = [stack.enter_context((tmp_path / str(i)).open("w")) for i in range(100)]
        assert any(file.fileno() == pipe.fileno() for file in files)
        child.__del__()
        for file in files:
            os.fstat(file.fileno())
    assert process.returncode == -signal.SIGKILL
    pipe._handle = None  # its own end must not close the number again either


def test_an_answer_that_was_not_taken_is_not_that_of_the_next_file(deadly, monkeypatch):
    first = running(deadly)

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.connection.Connection.recv_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            deadly.image(b"x")
    assert first.returncode == -signal.SIGKILL
    assert deadly.image(b"y").tolist() == [[1, 10]]


def test_a_child_that_can_not_start_is_one_clear_error():
    child = Child(_missing)
    with pytest.raises(ClusterError, match="did not start"):
        child(b"", seconds=1)


def _missing():
    raise RuntimeError("planted")

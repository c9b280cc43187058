"""The memory of a decode stays below the bound that docs/security.md states, whatever the file.

A process of its own decodes the files, so that memory which other tests left free is not counted;
Linux tells the peak of each decode by itself.
"""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

BYTES_PER_PIXEL, FILE_TIMES, FIXED_BYTES = 20, 4, 32 * 2**20
MAX_PIXELS = 2**22
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system does not tell peaks of memory"
)

DECODE = """
import json, sys
from stego_core.config.schema import ImageLimits
from stego_core.images.decode import ImageFailure, decode_image
limits = ImageLimits(max_pixels=int(sys.argv[1]), min_side=1)

def memory(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) * 1024

for path in sys.stdin:
    data = open(path.strip(), "rb").read()
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = memory("VmRSS")
    answer = decode_image(data, limits)
    grown = memory("VmHWM") - before
    end = answer.problem.value if isinstance(answer, ImageFailure) else "ok"
    print(json.dumps([end, grown]), flush=True)
    del answer
"""


class Decoder:
    def __init__(self, folder: Path) -> None:
        # Large blocks go back to the system at once, so that they are counted each time.
        env = {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": ":".join(sys.path)}
        command = [sys.executable, "-c", DECODE, str(MAX_PIXELS)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
        self._path = folder / "image"
        Image.new("RGB", (16, 16)).save(self._path, "PNG")
        self.decode(self._path.read_bytes())  # the first decode loads the codecs

    def decode(self, data: bytes) -> tuple[str, int]:
        """Return how it ended and by how many bytes memory grew at most."""
        self._path.write_bytes(data)
        self._process.stdin.write(f"{self._path}\n")
        self._process.stdin.flush()
        return tuple(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(30) == 0


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    decoder = Decoder(tmp_path_factory.mktemp("decoder"))
    yield decoder
    decoder.close()


def bound(data: bytes, pixels: int) -> int:
    return BYTES_PER_PIXEL * pixels + FILE_TIMES * len(data) + FIXED_BYTES


def picture(mode: str, width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    colour = Image.fromarray(noise.astype(np.uint8)).resize((width, height))
    if mode == "I;16":
        return Image.fromarray(np.asarray(colour.convert("L")).astype(np.uint16) * 257)
    return colour.convert(mode)


KINDS = [
    ("JPEG", "RGB", {}),
    ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    ("JPEG", "CMYK", {"progressive": True}),
    ("PNG", "RGB", {"compress_level": 1}),
    ("PNG", "RGBA", {"compress_level": 1}),
    ("PNG", "P", {"transparency": 0, "compress_level": 1}),
    ("PNG", "I;16", {"compress_level": 1}),
    ("WEBP", "RGB", {"method": 0}),
    ("WEBP", "RGBA", {"lossless": True, "method": 0, "quality": 0}),
    ("TIFF", "RGB", {}),
    ("TIFF", "RGBA", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", "CMYK", {"compression": "tiff_lzw"}),
    ("TIFF", "I;16", {}),
    ("BMP", "RGB", {}),
]


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(kind=st.sampled_from(KINDS), width=st.integers(1, 2600), height=st.integers(1, 2600))
def test_a_decode_takes_no_more_than_its_pixels_and_its_file_allow(decoder, kind, width, height):
    image_format, mode, options = kind
    buffer = io.BytesIO()
    picture(mode, width, height).save(buffer, image_format, **options)
    data = buffer.getvalue()
    end, grown = decoder.decode(data)
    assert end == ("ok" if width * height <= MAX_PIXELS else "too_many_pixels")
    # What is refused by its header costs the file, whatever it claims to hold.
    assert grown <= bound(data, width * height if end == "ok" else 0)


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    body = kind + payload
    return struct.pack(">I", len(payload)) + body + struct.pack(">I", zlib.crc32(body))


def png_with(chunk: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    data = buffer.getvalue()
    return data[:33] + chunk + data[33:]  # after the header


def zeros(count: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(count // 2**20)) + packer.flush()


def tiled_tiff(side: int, kind: int = 4, value: str = "<I") -> bytes:
    """A 64 x 64 image in one tile of side x side, deflated to almost nothing."""
    tile = zeros(side * side)
    tags = [(256, 64), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(322, side), (323, side), (324, 0), (325, len(tile))]
    start = 8 + 2 + len(tags) * 12 + 4
    entries = b""
    for tag, number in tags:
        own = (kind, struct.pack(value, number)) if tag in (322, 323) else None
        type_, packed = own or (4, struct.pack("<I", start if tag == 324 else number))
        entries += struct.pack("<HHI", tag, type_, 1) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + tile


def webp_with_canvas(side: int) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    data = bytearray(buffer.getvalue())
    assert data[12:16] == b"VP8X"
    data[24:30] = (side - 1).to_bytes(3, "little") * 2
    return bytes(data)


def jpeg_of(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG", progressive=True)
    data = bytearray(buffer.getvalue())
    frame = data.index(b"\xff\xc2")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def bmp_of(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "BMP")
    data = bytearray(buffer.getvalue())
    data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


BOMBS = {
    "a tile larger than its image": (tiled_tiff(12_000), "too_many_pixels"),
    "a tile whose size is a float": (tiled_tiff(12_000, 11, "<f"), "too_many_pixels"),
    "a canvas of 8000 x 8000": (webp_with_canvas(8_000), "too_many_pixels"),
    "a JPEG of 20000 x 20000": (jpeg_of(20_000), "too_many_pixels"),
    "a JPEG of 2000 x 2000 without data": (jpeg_of(2_000), "ok"),
    "a BMP of 20000 x 20000": (bmp_of(20_000), "too_many_pixels"),
    "a profile of 256 MB": (png_with(png_chunk(b"iCCP", b"x\0\0" + zeros(2**28))), "not_an_image"),
    "a text of 256 MB": (png_with(png_chunk(b"zTXt", b"x\0\0" + zeros(2**28))), "not_an_image"),
    "a TIFF that claims 4 billion numbers": (
        b"II*\0" + struct.pack("<IHHHII", 8, 1, 273, 4, 2**32 - 1, 8) + bytes(4),
        "not_an_image",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_unpacks_to_much_is_refused_or_stays_within_the_bound(decoder, name):
    data, expected = BOMBS[name]
    assert len(data) < 400_000
    end, grown = decoder.decode(data)
    assert end == expected
    assert grown <= bound(data, MAX_PIXELS if end == "ok" else 0)

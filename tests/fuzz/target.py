"""One process of the fuzz run: whatever the bytes, an image or a reason, in bounded memory.

libFuzzer (through atheris) drives it, guided by the branches of Pillow's parsers and of our own
decoder, which are Python; what C does behind them is met, but does not guide. A crash, a hang or an
exception ends the process; libFuzzer keeps the input. `run.py` starts this and counts.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["PIL", "stego_core.images"]):
    from stego_core.config.schema import ImageLimits
    from stego_core.errors import ImageProblem
    from stego_core.images.decode import ImageFailure, decode_image, decode_label

LIMITS = ImageLimits(max_pixels=2**20, max_side=2**14, min_side=1)
# The bound of docs/security.md, which tests/property/test_decode_memory.py measures.
# STEGO_FUZZ_BYTES replaces it, so that a test can see that the bound is looked at.
BYTES_PER_PIXEL, FILE_TIMES, FIXED_BYTES = 20, 4, 32 * 2**20


def bound_bytes(num_bytes: int) -> int:
    """Return by how much one decode may raise the process's peak."""
    stated = os.environ.get("STEGO_FUZZ_BYTES")
    if stated is not None:
        return int(stated)
    return BYTES_PER_PIXEL * LIMITS.max_pixels + FILE_TIMES * num_bytes + FIXED_BYTES


# How inputs ended, for the summary: libFuzzer leaves without running what Python would at exit.
_TALLY = os.environ.get("STEGO_FUZZ_TALLY")
_TALLY_EVERY = 1000
_ends: Counter[str] = Counter()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check(data: bytes) -> None:
    """Decode as an image and as a label; RuntimeError if an answer is none, or costs too much."""
    before = _peak_bytes()
    for decode, num_dims in ((decode_image, 3), (decode_label, 2)):
        answer = decode(data, LIMITS)
        if decode is decode_image:
            _count(answer.problem if isinstance(answer, ImageFailure) else ImageProblem.OK)
        if isinstance(answer, ImageFailure):
            is_one_line = 0 < len(answer.detail) <= 200 and "\n" not in answer.detail
            if answer.problem is ImageProblem.OK or not is_one_line:
                raise RuntimeError(f"no proper reason: {answer}")
        elif answer.ndim != num_dims or not 0 < answer[..., 0].size <= LIMITS.max_pixels:
            raise RuntimeError(f"no proper image: {answer.shape}")
    grown = _peak_bytes() - before
    if grown > bound_bytes(len(data)):
        raise RuntimeError(f"{grown} bytes of memory for {len(data)} bytes of input")


def _count(end: ImageProblem) -> None:
    _ends[end.value] += 1
    if _TALLY and _ends.total() % _TALLY_EVERY == 0:
        Path(_TALLY).write_text(json.dumps(_ends))


def repair_png(data: bytes) -> bytes:
    """Return a PNG with the checksums that its chunks should have; other data as they are.

    Without it nearly every changed PNG is refused at its first chunk.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    repaired, place = bytearray(data), 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            break
        struct.pack_into(">I", repaired, end, zlib.crc32(data[place + 4 : end]))
        place = end + 4
    return bytes(repaired)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Let libFuzzer change the input; of three PNGs two get correct checksums."""
    changed = atheris.Mutate(data, len(data))
    return repair_png(changed)[:max_size] if seed % 3 else changed


def main() -> None:
    """Hand over to libFuzzer, which reads its own flags."""
    warnings.filterwarnings("ignore")
    atheris.Setup(sys.argv, check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

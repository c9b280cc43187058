"""Decoding in a process of its own, so that a file that kills or stops a decoder is a failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from queue import LifoQueue
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stego_core.child import Answer, Child, ChildDied
from stego_core.config.schema import ImageLimits
from stego_core.errors import ImageProblem
from stego_core.images.decode import (
    ImageFailure,
    LabelMap,
    decode_image,
    decode_label,
    upright_size,
)

_TRIES: Final = 2  # of one file: a death may have had another cause
_BYTES_PER_PIXEL: Final = 24  # of a decoder at its limits: a few copies of four channels


def stated_memory(limits: ImageLimits) -> int:
    """Return the bytes that a decoder may need for a file within the limits."""
    return _BYTES_PER_PIXEL * limits.max_pixels + 2 * limits.max_bytes


def call_apart(child: Child, request: bytes, limits: ImageLimits) -> bytes | ImageFailure:
    """Return a child's answer, or `crashed` or `timed_out` if it gives none twice.

    Raises:
        ClusterError: if the child does not start.
    """
    died = ChildDied(None)
    for _ in range(_TRIES):
        try:
            return child(request, seconds=limits.max_seconds)
        except ChildDied as error:
            died = error
    if died.is_late:
        detail = f"decoding took more than {limits.max_seconds:g} s"
        return ImageFailure(ImageProblem.TIMED_OUT, detail)
    return ImageFailure(ImageProblem.CRASHED, f"the process that decoded it ended: {died}")


class ApartDecoder:
    """Decodes files in child processes, which start when they are needed.

    For what is decoded outside the tasks of a job, which may die themselves: labels, and pictures
    in the driver. Threads may share it.

    Args:
        limits: of the decoder; `max_seconds` ends a file.
        at_once: children, and so files that are decoded at a time.
    """

    def __init__(self, limits: ImageLimits, *, at_once: int = 1) -> None:
        self._limits = limits
        self._idle: LifoQueue[Child] = LifoQueue()  # the one used last is running
        for _ in range(at_once):
            child = Child(partial(_answers, limits), memory=lambda: stated_memory(limits))
            self._idle.put(child)

    def image(self, data: bytes) -> NDArray[np.uint8] | ImageFailure:
        """Return what `decode_image` returns, or `crashed` or `timed_out`."""
        found: NDArray[np.uint8] | ImageFailure = self._decode(b"image", data)
        return found

    def label(self, data: bytes) -> LabelMap | ImageFailure:
        """Return what `decode_label` returns, or `crashed` or `timed_out`."""
        found: LabelMap | ImageFailure = self._decode(b"label", data)
        return found

    def size(self, data: bytes) -> tuple[int, int] | ImageFailure:
        """Return what `upright_size` returns, or `crashed` or `timed_out`."""
        found = self._decode(b"size", data)
        return found if isinstance(found, ImageFailure) else (int(found[0]), int(found[1]))

    def _decode(self, what: bytes, data: bytes) -> Any:
        child = self._idle.get()
        try:
            answer = call_apart(child, what + b"\n" + data, self._limits)
        finally:
            self._idle.put(child)
        if isinstance(answer, ImageFailure):
            return answer
        end = answer.index(b"\n")
        told = json.loads(answer[:end])
        if "problem" in told:
            return ImageFailure(ImageProblem(told["problem"]), told["detail"])
        # Of a bytearray, so that it can be written to, as what a decoder returns can.
        pixels = bytearray(memoryview(answer)[end + 1 :])
        return np.frombuffer(pixels, told["type"]).reshape(told["shape"])


_DECODERS: Final[dict[bytes, Callable[[bytes, ImageLimits], Any]]] = {
    b"image": decode_image,
    b"label": decode_label,
    b"size": upright_size,
}


def _answers(limits: ImageLimits) -> Answer:
    """Return the decoders as a function of bytes: a line of JSON and the pixels for result."""

    def answer(request: bytes) -> bytes:
        what, _, data = request.partition(b"\n")
        found = _DECODERS[what](data, limits)
        if isinstance(found, ImageFailure):
            return json.dumps({"problem": found.problem, "detail": found.detail}).encode() + b"\n"
        array = np.asarray(found)
        head = {"type": array.dtype.str, "shape": array.shape}
        return b"\n".join([json.dumps(head).encode(), array.data])

    return answer

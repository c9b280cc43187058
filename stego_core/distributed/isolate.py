"""Decoding in a process that may die or hang: how a picture that does that is found and set aside.

Units are decoded in their own Ray task, which costs nothing extra. A unit whose task died is
decoded again with every picture in a child process (docs/adr/0021): a child that dies, or is still
busy after the time limit, takes one picture with it and is replaced.
"""

from __future__ import annotations

import json
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from ray import cloudpickle

from stego_core.child import Answer, Child
from stego_core.config.schema import ImageLimits
from stego_core.doctor.machine import available_memory
from stego_core.images.apart import call_apart, stated_memory
from stego_core.images.decode import ImageFailure

Decode = Callable[[bytes, int], dict[str, Any]]
"""Bytes and image id → the columns of `fetch_unit`, `pixels` as bytes."""

_ALWAYS_BYTES: Final = 256 * 2**20  # a picture of 10 megapixels, however little is left


class TimeLimit:
    """Ends this whole process if work gets nowhere for too long.

    Native code can't be interrupted, and may hold the interpreter's lock: so the kernel's timer
    does it (SIGALRM). It starts anew when a picture (or a unit) begins or ends, and stands still
    while none is in work, such as during reads.

    Args:
        seconds: until the process ends.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._running, self._lock = seconds, 0, threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Decode one picture, or compute one unit, in this context."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        with self._lock:
            self._running += by
            signal.setitimer(signal.ITIMER_REAL, self._seconds if self._running else 0)


class ChildDecoder:
    """Decodes pictures one after another in a child process.

    Args:
        decode: what the child runs.
        limits: `max_seconds` ends a picture; `max_pixels` and `max_bytes` bound the child's memory.
        share: of the memory that is left on this node, which bounds the child, too.
    """

    def __init__(self, decode: Decode, limits: ImageLimits, *, share: float = 0.5) -> None:
        self._limits, self._share = limits, share
        self._child = Child(lambda: _answers(decode), memory=self._memory, dumps=cloudpickle.dumps)

    def __call__(self, data: bytes, image_id: int) -> dict[str, Any]:
        """Return what `decode` returns, or `crashed` or `timed_out`."""
        answer = call_apart(self._child, struct.pack("<q", image_id) + data, self._limits)
        if isinstance(answer, ImageFailure):
            return {"status": answer.problem.value, "detail": answer.detail}
        found, _, pixels = answer.partition(b"\n")
        return dict(json.loads(found)) | ({"pixels": pixels} if pixels else {})

    def _memory(self) -> int:
        """Return the bytes that a child may take.

        Ray's memory monitor would end the parent, and with it all that is known of the picture.
        """
        stated = stated_memory(self._limits)
        left = available_memory()
        if left is None:
            return stated
        return min(stated, max(_ALWAYS_BYTES, int(left * self._share)))

    def close(self) -> None:
        """End the child."""
        self._child.close()


def _answers(decode: Decode) -> Answer:
    """Return `decode` with bytes for arguments, and a line of JSON and the pixels for result."""

    def answer(request: bytes) -> bytes:
        (image_id,) = struct.unpack("<q", request[:8])
        found = decode(request[8:], image_id)
        pixels: bytes = found.pop("pixels", b"")
        return json.dumps(found).encode() + b"\n" + pixels

    return answer

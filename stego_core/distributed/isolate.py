"""Decoding in a process that may die or hang: how a picture that does that is found and set aside.

Units are decoded in their own Ray task, which costs nothing extra. A unit whose task died is
decoded again with every picture in a child process (docs/adr/0021): a child that dies, or is still
busy after the time limit, takes one picture with it and is replaced.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from ray import cloudpickle

from stego_core.config.schema import ImageLimits
from stego_core.doctor.machine import available_memory
from stego_core.errors import ImageProblem

Decode = Callable[[bytes, int], dict[str, Any]]
"""Bytes and image id → the columns of `fetch_unit`, `pixels` as bytes."""

_TRIES: Final = 2  # of one picture in a child: a death may have had another cause
_BYTES_PER_PIXEL: Final = 24  # of a decoder at its limits: a few copies of four channels
_ALWAYS_BYTES: Final = 256 * 2**20  # a picture of 10 megapixels, however little is left
_START_S: Final = 60.0


class TimeLimit:
    """Ends this whole process if decoding gets nowhere for too long.

    Native code can't be interrupted, and may hold the interpreter's lock: so the kernel's timer
    does it (SIGALRM). It starts anew whenever a picture begins or ends, and stands still while
    none is being decoded, such as during reads.

    Args:
        seconds: until the process ends.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._running, self._lock = seconds, 0, threading.Lock()

    @contextmanager
    def image(self) -> Iterator[None]:
        """Decode one picture in this context."""
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

    The child sends JSON and raw bytes, never pickles: a picture may have taken it over.

    Args:
        decode: what the child runs.
        limits: `max_seconds` ends a picture; `max_pixels` and `max_bytes` bound the child's memory.
        share: of the memory that is left on this node, which bounds the child, too.
    """

    def __init__(self, decode: Decode, limits: ImageLimits, *, share: float = 0.5) -> None:
        self._payload, self._limits, self._share = cloudpickle.dumps(decode), limits, share
        self._child: tuple[Any, Connection] | None = None

    def __call__(self, data: bytes, image_id: int) -> dict[str, Any]:
        """Return what `decode` returns, or `crashed` or `timed_out`."""
        code = None
        for _ in range(_TRIES):
            process, pipe = self._child or self._start()
            try:
                pipe.send_bytes(struct.pack("<q", image_id) + data)
                found = dict(json.loads(pipe.recv_bytes()))
                pixels = pipe.recv_bytes()
            except (EOFError, OSError):
                process.join()
                code = process.exitcode
                self.close()
                continue
            return found | ({"pixels": pixels} if pixels else {})
        return _problem(code, self._limits)

    def _start(self) -> tuple[Any, Connection]:
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        settings = (other, self._payload, self._limits.max_seconds, self._memory())
        process = context.Process(target=_serve, args=settings, daemon=True)
        process.start()
        other.close()
        if not pipe.poll(_START_S):
            raise OSError("the decoder's process did not start")
        pipe.recv_bytes()
        self._child = (process, pipe)
        return self._child

    def _memory(self) -> int:
        """Return the bytes that a child may take.

        Ray's memory monitor would end the parent, and with it all that is known of the picture.
        """
        stated = _BYTES_PER_PIXEL * self._limits.max_pixels + 2 * self._limits.max_bytes
        left = available_memory()
        if left is None:
            return stated
        return min(stated, max(_ALWAYS_BYTES, int(left * self._share)))

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            process, pipe = self._child
            self._child = None
            pipe.close()
            process.kill()
            process.join()


def _problem(code: int | None, limits: ImageLimits) -> dict[str, Any]:
    if code == -signal.SIGALRM:
        detail = f"decoding took more than {limits.max_seconds:g} s"
        return {"status": ImageProblem.TIMED_OUT.value, "detail": detail}
    reason = f"exit code {code}"
    with suppress(ValueError):
        reason = signal.Signals(-(code or 0)).name
    detail = f"the process that decoded it ended: {reason}"
    return {"status": ImageProblem.CRASHED.value, "detail": detail}


def _serve(pipe: Connection, payload: bytes, seconds: float, memory: int) -> None:
    """Decode in the child until the parent closes the pipe."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    decode: Decode = cloudpickle.loads(payload)
    _limit_memory(memory)
    pipe.send_bytes(b"ready")
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        (image_id,) = struct.unpack("<q", request[:8])
        # Set here, not by the parent: it holds although the parent may have died.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        found = decode(request[8:], image_id)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pixels = found.pop("pixels", b"")
        pipe.send_bytes(json.dumps(found).encode())
        pipe.send_bytes(pixels)


def _limit_memory(num_bytes: int) -> None:
    """Allow so many bytes beyond what is used: a bomb is an error, not the machine's end."""
    status = Path("/proc/self/status")
    if not status.exists():  # only Linux counts private memory here
        return
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmData")]
    limit = int(line.split()[1]) * 1024 + num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

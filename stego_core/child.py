"""A process that may die or hang while its parent goes on: a function that is called in it."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from stego_core.errors import ClusterError

_START_S: Final = 300.0  # of a child that loads a model beside others that do so
_END_S: Final = 10.0  # of a child that closed its pipe
_LOOK_S: Final = 1.0  # between looks for the parent

Answer = Callable[[bytes], bytes]


class ChildDied(Exception):
    """The child ended before it answered.

    Attributes:
        code: its exit code, negative for a signal.
    """

    def __init__(self, code: int | None) -> None:
        reason = f"exit code {code}"
        with suppress(ValueError):
            reason = signal.Signals(-(code or 0)).name
        super().__init__(reason)
        self.code = code

    @property
    def is_late(self) -> bool:
        """Tell whether it was ended by its time limit."""
        return self.code == -signal.SIGALRM


class Child:
    """Calls a function in a child process; one that died is replaced by the next call.

    The child answers with bytes, never with pickles: what it was given may have taken it over. It
    imports what the function needs and nothing else, also not the program that the parent runs.

    Args:
        start: called in each child, returns the function.
        memory: → bytes that a child may take beyond what it has when it is ready, or None.
        dumps: how `start` travels: as a name that can be imported, unless this does better.
    """

    def __init__(
        self,
        start: Callable[[], Answer],
        *,
        memory: Callable[[], int | None] = lambda: None,
        dumps: Callable[[object], bytes] = pickle.dumps,
    ) -> None:
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._payload, self._memory = dumps(start), memory

    def __call__(self, request: bytes, *, seconds: float) -> bytes:
        """Return the function's answer.

        Args:
            request: what it is called with.
            seconds: after which the kernel ends the child, whatever it is at.

        Raises:
            ChildDied: if it ended, also by an exception.
            ClusterError: if it did not start, which is nobody's fault.
        """
        process, pipe = self.ready()
        try:
            pipe.send_bytes(repr(seconds).encode())
            pipe.send_bytes(request)
            return pipe.recv_bytes()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            self.close()
            raise ChildDied(process.returncode) from None
        except BaseException:
            self.close()  # its answer must not become that of the next request
            raise

    def ready(self) -> tuple[subprocess.Popen[bytes], Connection]:
        """Start the child, unless there is one, and wait until it can answer.

        Raises:
            ClusterError: if it did not start.
        """
        if self._child is None:
            self._child = self._start()
        return self._child

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        pipe, other = Pipe()
        with other:
            command = [sys.executable, "-P", "-m", __name__, str(other.fileno())]
            try:
                process = subprocess.Popen(  # noqa: S603 - this interpreter and this module
                    command,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                    stdin=subprocess.DEVNULL,
                    pass_fds=[other.fileno()],
                )
            except OSError as error:
                raise ClusterError(f"a child process did not start: {error}") from error
        try:
            memory = self._memory()
            pipe.send_bytes(self._payload)
            pipe.send_bytes(b"" if memory is None else str(memory).encode())
            if pipe.poll(_START_S):
                pipe.recv_bytes()
                return process, pipe
        except (EOFError, OSError):
            pass
        except BaseException:
            _end(process, pipe)
            raise
        _end(process, pipe)
        raise ClusterError(
            "a child process did not start: see its error above, and what is left of memory"
        )

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            child, self._child = self._child, None
            _end(*child)

    def __del__(self) -> None:
        """End the child of an object that nobody has any more.

        Its pipe is left to close itself: it may have done so, and its number be another file's.
        """
        if self._child is not None:
            _kill(self._child[0])


def _end(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    _kill(process)
    pipe.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _serve(pipe: Connection) -> None:
    """Answer in the child until the parent closes the pipe."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: for the parent to act on
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    answer: Answer = pickle.loads(pipe.recv_bytes())()  # noqa: S301 - of the parent itself
    if memory := pipe.recv_bytes():
        _limit_memory(int(memory))
    pipe.send_bytes(b"ready")
    while True:
        try:
            seconds, request = float(pipe.recv_bytes()), pipe.recv_bytes()
        except EOFError:
            return
        # Set here, not by the parent: it holds although the parent may have died.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        result = answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send_bytes(result)


def _end_with_parent(parent: int) -> None:
    """End a child whose parent was killed while it waited for an answer."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(1)


def _limit_memory(num_bytes: int) -> None:
    """Allow so many bytes beyond what is used: a bomb is an error, not the machine's end."""
    status = Path("/proc/self/status")
    if not status.exists():  # only Linux counts private memory here
        return
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmData")]
    limit = int(line.split()[1]) * 1024 + num_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))

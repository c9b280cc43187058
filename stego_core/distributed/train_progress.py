"""What a training tells while its workers run: the driver reads the events that rank 0 writes."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from stego_core.storage import fs
from stego_core.storage.lease import Lease
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0
_LOCAL_EVERY_S, _REMOTE_EVERY_S = 1.0, 10.0  # a store is asked for the whole file
_END_S = 5.0  # that the end of a training waits for a store that does not answer


def events_name(run_uri: str) -> str:
    """Return the file that workers write events to.

    An object store can't append: there the driver and the workers have a file each.
    """
    return "events.jsonl" if fs.is_local(run_uri) else "events-train.jsonl"


@contextmanager
def follow(run: RunDirectory, steps: int, lease: Lease) -> Iterator[None]:
    """Log how far the workers are, and keep `status.json` current, until the block is left.

    Whatever goes wrong in it is left out of the log; no report may stop a training.

    Args:
        run: of the training; nothing else may write its status meanwhile.
        steps: of the whole training.
        lease: of the run directory; once another job has it, nothing is told.
    """
    lines = TrainingLines(run, steps)
    events = WorkerEvents(run.uri)
    ended, silent = threading.Event(), threading.Event()
    every_s = _LOCAL_EVERY_S if fs.is_local(run.uri) else _REMOTE_EVERY_S

    def look() -> None:
        try:
            lease.check()
            found = events.new()
            if not silent.is_set():
                lines.add(found)
        except Exception as error:
            logger.debug("progress can't be told: %s", error)

    def run_until_ended() -> None:
        look()
        while not ended.wait(every_s):
            look()
        look()

    thread = threading.Thread(target=run_until_ended, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        silent.set()  # what comes next, a word of the failure, must not be overwritten
        raise
    finally:
        ended.set()
        thread.join(_END_S)
        silent.set()  # nor what the job says after a store that did not answer


class WorkerEvents:
    """The events that are appended to a run's file from now on.

    Args:
        run_uri: of the run directory.
    """

    def __init__(self, run_uri: str) -> None:
        self._uri = fs.join(run_uri, events_name(run_uri))
        # In a store the first look tells: workers take longer to start than it does.
        self._read: int | None = None
        if fs.is_local(run_uri):
            self._read = 0
            with suppress(OSError):
                self._read = fs.local_path(self._uri).stat().st_size

    def new(self) -> list[dict[str, Any]]:
        """Return the events since the last call; a line that is not whole yet is left for then."""
        if self._read is None:
            self._read = len(self._rest(0))
        whole = self._rest(self._read)
        whole = whole[: whole.rfind(b"\n") + 1]
        self._read += len(whole)
        return [_parsed(line) for line in whole.splitlines()]

    def _rest(self, start: int) -> bytes:
        if not fs.is_local(self._uri):
            return (fs.read_if_exists(self._uri) or b"")[start:]
        path = fs.local_path(self._uri)
        if not path.exists():
            return b""
        with path.open("rb") as stream:
            stream.seek(start)
            return stream.read()


def _parsed(line: bytes) -> dict[str, Any]:
    """Return an event; one that no one is told of where a process died in the line."""
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {"event": "torn"}


class TrainingLines:
    """Turns events of a training into lines of the log and counts of `status.json`.

    Args:
        run: of the training.
        steps: of the whole training.
    """

    def __init__(self, run: RunDirectory, steps: int) -> None:
        self._run, self._steps = run, steps
        self._line_s = float("-inf")

    def add(self, events: list[dict[str, Any]]) -> None:
        """Tell of events, of several steps the last one."""
        of_steps = [event for event in events if event["event"] == "train/step"]
        for event in events:
            if event["event"] == "train/resumed":
                logger.info("train: going on from step %d", event["step"])
            elif event["event"] == "clusters/count":
                logger.info("train: %d clusters, chosen without labels", event["count"])
            elif event["event"] == "clusters/pass":
                logger.info("train: pass %d of k-means over all codes", event["number"])
        if of_steps:
            self._step(of_steps[-1])

    def _step(self, event: dict[str, Any]) -> None:
        step, now_s = int(event["step"]), time.monotonic()
        is_last = step == self._steps
        if now_s - self._line_s < _LINE_EVERY_S and not is_last:
            return
        self._line_s = now_s
        self._run.count(steps=step)
        self._run.status("running", stage="train")
        rate = float(event["throughput/steps_per_s"])
        logger.info(
            "train %d/%d (%d %%)  %.1f steps/s  loss %.4f  eta %.0f s%s",
            step,
            self._steps,
            100 * step // self._steps,
            rate,
            event["loss/total"],
            (self._steps - step) / max(rate, 1e-9),
            "; now clusters and probes are fitted" if is_last else "",
        )

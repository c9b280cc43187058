"""What a training tells while its workers run: the driver reads the events that rank 0 writes."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stego_core.storage import fs
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0
_LOCAL_EVERY_S, _REMOTE_EVERY_S = 1.0, 10.0  # a store is asked for the whole file


def events_name(run_uri: str) -> str:
    """Return the file that workers write events to.

    An object store can't append: there the driver and the workers have a file each.
    """
    return "events.jsonl" if fs.is_local(run_uri) else "events-train.jsonl"


@contextmanager
def follow(run: RunDirectory, steps: int) -> Iterator[None]:
    """Log how far the workers are, and keep `status.json` current, until the block is left.

    Args:
        run: of the training; nothing else may write its status meanwhile.
        steps: of the whole training.
    """
    told = WorkerEvents(run.uri)
    lines = TrainingLines(run, steps)
    ended = threading.Event()
    every_s = _LOCAL_EVERY_S if fs.is_local(run.uri) else _REMOTE_EVERY_S

    def look() -> None:
        try:
            lines.add(told.new())
        except Exception as error:  # no report may ever stop a training
            logger.debug("progress can't be told: %s", error)

    def run_until_ended() -> None:
        while not ended.wait(every_s):
            look()
        look()

    thread = threading.Thread(target=run_until_ended, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class WorkerEvents:
    """The events that are appended to a run's file from now on.

    Args:
        run_uri: of the run directory.
    """

    def __init__(self, run_uri: str) -> None:
        self._uri = fs.join(run_uri, events_name(run_uri))
        self._read = 0
        self._read = len(self._rest())

    def new(self) -> list[dict[str, Any]]:
        """Return the events since the last call; a line that is not whole yet is left for then."""
        whole = self._rest()
        whole = whole[: whole.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _rest(self) -> bytes:
        if not fs.is_local(self._uri):
            return (fs.read_if_exists(self._uri) or b"")[self._read :]
        path = fs.local_path(self._uri)
        if not path.exists():
            return b""
        with path.open("rb") as stream:
            stream.seek(self._read)
            return stream.read()


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

"""How far a stage is: status.json for machines, a line now and then for people."""

from __future__ import annotations

import logging
import time

import numpy as np

from stego_core.errors import ImageProblem
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)
_LINE_EVERY_S = 10.0
_STATUS_EVERY_S = 2.0
_WARM_UNITS, _MIN_UNITS = 2, 4  # what the steady rate leaves out, and needs


class Progress:
    """Counts the images of a stage as their units are done.

    Args:
        run: where status and events go.
        stage: name of the stage.
        total: images of the whole job.
        done: images that earlier runs did.
    """

    def __init__(self, run: RunDirectory, *, stage: str, total: int, done: int = 0) -> None:
        self._run, self._stage, self._total = run, stage, total
        self._before = self._done = done
        self._ok = 0
        self._started_s = time.monotonic()
        self._line_s = self._status_s = self._started_s
        self._done_at: list[tuple[float, int]] = []  # seconds and images done, at each unit

    def add(self, statuses: dict[str, int]) -> None:
        """Count the images of one unit by status."""
        self._done += sum(statuses.values())
        self._ok += statuses.get(ImageProblem.OK, 0)
        now_s = time.monotonic()
        self._done_at.append((now_s - self._started_s, self._done))
        if now_s - self._status_s > _STATUS_EVERY_S:
            self._status_s = now_s
            self._run.count(total=self._total, done=self._done)
            self._run.status("running", stage=self._stage)
        if now_s - self._line_s > _LINE_EVERY_S or self._done == self._total:
            self._line_s = now_s
            self._line(now_s)

    def finish(self) -> None:
        """Record the stage's throughput, with the start of its actors and without.

        `steady_images_per_s` is the slope of images done over time, without the first units, which
        wait for actors to start; null for fewer than six units.
        """
        new = self._done - self._before
        elapsed_s = time.monotonic() - self._started_s
        self._run.count(total=self._total, done=self._done)
        self._run.event(
            f"{self._stage}/done",
            images=self._done,
            new=new,
            elapsed_s=round(elapsed_s, 3),
            images_per_s=round(new / max(elapsed_s, 1e-9), 3),
            steady_images_per_s=self._steady_rate(),
        )

    def _steady_rate(self) -> float | None:
        settled = self._done_at[_WARM_UNITS:]
        if len(settled) < _MIN_UNITS or settled[0][0] == settled[-1][0]:
            return None
        times, images = zip(*settled, strict=True)
        return round(float(np.polyfit(times, images, 1)[0]), 3)

    def _line(self, now_s: float) -> None:
        new = self._done - self._before
        rate = new / max(now_s - self._started_s, 1e-9)
        logger.info(
            "%s %d/%d (%d %%)  %.1f images/s  ok %d  bad %d  eta %.0f s",
            self._stage,
            self._done,
            self._total,
            100 * self._done // self._total,
            rate,
            self._ok,
            new - self._ok,
            (self._total - self._done) / max(rate, 1e-9),
        )

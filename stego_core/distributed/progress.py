"""How far a stage is: status.json for machines, a line now and then for people."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from stego_core.errors import ImageProblem
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)
_LINE_EVERY_S = 10.0
_STATUS_EVERY_S = 2.0
_MIN_ROUNDS = 2  # of units in work at once that a steady rate is taken over


class Progress:
    """Counts the images of a stage as their units are done.

    Args:
        run: where status and events go.
        stage: name of the stage.
        total: images of the whole job.
        at_once: units in work at a time, in all actors together.
        done: images that earlier runs did.
    """

    def __init__(
        self, run: RunDirectory, *, stage: str, total: int, at_once: int, done: int = 0
    ) -> None:
        self._run, self._stage, self._total, self._at_once = run, stage, total, at_once
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

        `steady_images_per_s` is that of `steady_rate`, null for too few units.
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
            steady_images_per_s=steady_rate(self._done_at, at_once=self._at_once),
        )

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


def steady_rate(done_at: Sequence[tuple[float, int]], *, at_once: int) -> float | None:
    """Return the images per second of a stage between its start and its end.

    Units that are in work together share threads, so they may end together: the count then rises in
    steps, as often as not one step too high or too low. A span of whole rounds, each as many units
    as are in work at once, holds the same work wherever it begins. The rate is that of such
    spans, as long as there are, one beginning at each unit of a round.

    Units of the first round waited for actors to start. While the last round is done, actors run
    out of work, and the last unit may be a short one. Neither is looked at.

    Args:
        done_at: seconds, and images done until then, at the end of each unit.
        at_once: units in work at a time, in all actors together.

    Returns:
        Null for fewer than `5 * at_once - 1` units.
    """
    settled = done_at[at_once - 1 : -at_once]
    rounds = len(settled) // at_once - 1
    if rounds < _MIN_ROUNDS:
        return None
    span = rounds * at_once
    ends = list(zip(settled, settled[span:], strict=False))
    took_s = sum(late - early for (early, _), (late, _) in ends)
    images = sum(after - before for (_, before), (_, after) in ends)
    return round(images / took_s, 3) if took_s > 0 else None

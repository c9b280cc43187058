"""Early stopping of a study: at each rung the worse trials end (asynchronous successive halving).

Source: Li et al. 2020 (ASHA): a trial is compared with those that reached the rung before it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler


class Ladder:
    """What trials reached at each rung.

    Args:
        keep: share that goes on, (0, 1).
    """

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self._reached: dict[int, dict[str, float]] = {}

    def add(self, rung: int, trial: str, value: float) -> bool:
        """Note what a trial reached, once however often it is repeated; tell whether it goes on.

        It does if it is among the best `keep` of all that came to this rung so far, rounded up: the
        first one always goes on.
        """
        reached = self._reached.setdefault(rung, {})
        reached[trial] = value
        better = sum(other > value for other in reached.values())
        return better < math.ceil(self._keep * len(reached))


class RungScheduler(FIFOScheduler):  # type: ignore[misc]
    """Ray Tune's scheduler: trials in their order, ended where the ladder says so.

    Args:
        ladder: with what earlier runs of the study reached.
        stopped: called with the record of a trial that ends at a rung, before it does.
    """

    def __init__(self, ladder: Ladder, stopped: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._ladder, self._stopped = ladder, stopped

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Compare a trial that came to a rung; let any other go on."""
        if "rung" not in result:
            return str(TrialScheduler.CONTINUE)
        record = json.loads(result["record"])
        if self._ladder.add(result["rung"], record["key"], result["value"]):
            return str(TrialScheduler.CONTINUE)
        self._stopped(record)
        return str(TrialScheduler.STOP)

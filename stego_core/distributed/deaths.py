"""Which units were in work in a process that died: what a task can't know of its own retry."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class DeathLedger:
    """Counts, for each unit of each stage, how often it was begun and not ended."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def begin(self, unit: str) -> int:
        """Take note that a unit is begun; return how often that had no end."""
        self._open[unit] += 1
        return self._open[unit] - 1

    def end(self, unit: str) -> None:
        """Take note that a unit has ended; what did not end before stays counted.

        A task of several units begins with the first again when it dies at a later one: a unit
        whose deaths were forgotten would kill it once more.
        """
        # A ledger that was restarted knows nothing of the begin.
        self._open[unit] = max(0, self._open[unit] - 1)


def start_ledger() -> Any:
    """Return the handle of a ledger, an actor beside the driver: it should die with it only."""
    node = ray.get_runtime_context().get_node_id()
    actor = ray.remote(DeathLedger)
    options = {
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
    }
    return actor.options(**options).remote()

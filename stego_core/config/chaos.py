"""Settings of the soak under injected faults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stego_core.config.base import NonNegative, Positive, PositiveFloat, Strict

Fault = Literal["driver", "actor", "task", "node", "head"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig(Strict):
    """Which faults are injected, how many and how often."""

    kinds: tuple[Fault, ...] = ("driver", "actor", "task", "node", "head")
    """What is killed (SIGKILL): the job's driver, a process with the model, one that reads or
    writes, all processes of a worker node, all of the head node with the rest of the cluster."""
    rounds: Positive = 5
    """Jobs, each into an output of its own."""
    per_round: NonNegative = 10
    """Faults of one round; after the last, the job is left to end."""
    mean_s: PositiveFloat = 4.0
    """Mean seconds between faults; the times are drawn. With `out` in a store, a job waits 40 s for
    the lease of a driver that was killed; faults of that time hit a cluster at rest."""
    minutes: PositiveFloat = 60.0
    """No new round is started after this time."""

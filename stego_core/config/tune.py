"""Settings of a study: which trials are made of a space, and how they are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Le, Lt

from stego_core.config.base import Positive, Strict

Sampler = Literal["one-at-a-time", "random", "grid"]
Criterion = Literal["agreement", "stability", "margin"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig(Strict):
    """How a study samples its space and judges its trials."""

    sampler: tuple[Sampler, ...] = ("one-at-a-time",)
    """`one-at-a-time`: each value of each setting, the others as in the job (curves); `random`:
    all settings drawn together (importance, interactions); `grid`: every combination. Several may
    be named; settings that two of them make are one trial."""
    samples: Positive = 24
    """Draws of the `random` sampler."""
    points: Annotated[int, Gt(1), Le(50)] = 5
    """Values that a range gives to `one-at-a-time` and `grid`, its ends included."""
    seeds: Positive = 2
    """Seeds of each setting of `one-at-a-time` and `grid`, from `seed` on."""
    draw_seeds: Positive = 1
    """Seeds of each draw of `random`: more draws tell more than more seeds of the same."""
    parallel: Positive = 1
    """Trials at a time. Each computes on one thread, or one GPU, so that this number changes no
    result."""
    criterion: Criterion = "agreement"
    """What the best trial is chosen by and bad ones are stopped by; labels are never used. All
    criteria are written. docs/sensitivity.md says how well each follows labelled scores."""
    rungs: tuple[Positive, ...] = ()
    """Steps at which trials are compared and the worse ones stopped; empty stops none. Trials that
    were stopped bias importances: use it to find a good setting, not to study all."""
    keep: Annotated[float, Gt(0), Lt(1)] = 0.5
    """Share of the trials that goes on at each rung."""
    split: str = "val"
    """The split with labels that finished trials are scored on, for the record only. Without such
    labels there are no scores."""

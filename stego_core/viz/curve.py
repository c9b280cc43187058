"""Curves of a training, scaled for the report."""

from __future__ import annotations

import math
from dataclasses import dataclass

CURVE_SIZE = (300.0, 90.0)
"""Width and height of the box that curves are drawn in."""
_MAX_CURVE_POINTS = 500


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve scaled into its box, as the page draws it."""

    name: str
    lines: list[str]  # SVG points in a box of `CURVE_SIZE`; a non-finite value breaks the line
    low: float
    high: float
    last: float
    first_step: int
    last_step: int


def scale_curve(name: str, points: list[tuple[int, float]]) -> Curve:
    """Scale a curve into the box; many points become the means of equal runs of them."""
    ordered = sorted(points, key=lambda point: point[0])
    size = max(math.ceil(len(ordered) / _MAX_CURVE_POINTS), 1)
    runs = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    means = [(run[-1][0], sum(value for _, value in run) / len(run)) for run in runs]
    finite = [value for _, value in means if math.isfinite(value)]
    low, high = min(finite, default=math.nan), max(finite, default=math.nan)
    first, last = (means[0][0], means[-1][0]) if means else (0, 0)
    lines: list[list[str]] = [[]]
    for step, value in means:
        if not math.isfinite(value):
            lines.append([])
            continue
        x = CURVE_SIZE[0] * ((step - first) / (last - first) if last > first else 0.5)
        y = CURVE_SIZE[1] * ((high - value) / (high - low) if high > low else 0.5)
        lines[-1].append(f"{x:.1f},{y:.1f}")
    end = ordered[-1][1] if ordered else math.nan
    return Curve(name, [" ".join(line) for line in lines if line], low, high, end, first, last)

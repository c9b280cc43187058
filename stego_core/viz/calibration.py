"""The calibration of a training as the report shows it: where correspondences lie, and the shifts.

Numbers come from `events.jsonl`, which somebody may have changed: what isn't a number is no
calibration, and what is drawn is made of numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_KINDS = ("self", "knn", "random")
_WIDTH, _ROW, _LEFT, _TOP = 560, 40, 64, 8
_BAR = 14


@dataclass(frozen=True, slots=True)
class KindFacts:
    """Correspondences of one kind of pair.

    Attributes:
        kind: `self`, `knn` or `random`.
        quantiles: 5, 25, 50, 75 and 95 % of them.
        mean: of them.
        shift: b; pairs above it attract each other.
        attracted: share of the pairs above it, [0, 1]; NaN where it was not recorded.
    """

    kind: str
    quantiles: tuple[float, ...]
    mean: float
    shift: float
    attracted: float


@dataclass(frozen=True, slots=True)
class CalibrationFacts:
    """What a training measured before its first step.

    Attributes:
        mode: `auto`, `fixed` or `adaptive`; with the last the shifts were not used.
        kinds: of pairs.
    """

    mode: str
    kinds: tuple[KindFacts, ...]


def read_calibration(event: Mapping[str, Any]) -> CalibrationFacts | None:
    """Return the event `calibration` of a training; None if it isn't whole."""
    attracted = event.get("attracted", {})
    try:
        kinds = tuple(
            KindFacts(
                kind,
                tuple(float(value) for value in event["quantiles"][kind]),
                float(event["means"][kind]),
                float(event["shifts"][kind]),
                float(attracted.get(kind, math.nan)),
            )
            for kind in _KINDS
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    shown = [value for each in kinds for value in (*each.quantiles, each.mean, each.shift)]
    if any(len(each.quantiles) != 5 for each in kinds) or not all(map(math.isfinite, shown)):
        return None
    return CalibrationFacts(str(event.get("mode", "auto")), kinds)


def correspondences_svg(facts: CalibrationFacts) -> str:
    """Return a drawing of each kind's quantiles: 5 to 95 % thin, 25 to 75 % thick, shift dashed."""
    values = [v for each in facts.kinds for v in (*each.quantiles, each.shift)] + [0.0]
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 12) * (value - low) / span

    height = _TOP + _ROW * len(facts.kinds) + 22
    parts = [_line(place(0), _TOP, place(0), height - 18, "axis")]
    for row, each in enumerate(facts.kinds):
        middle = _TOP + _ROW * row + _ROW / 2
        q05, q25, q50, q75, q95 = map(place, each.quantiles)
        parts += [
            f'<text x="0" y="{middle + 4:.1f}">{each.kind}</text>',
            _line(q05, middle, q95, middle, "range"),
            f'<rect class="box" x="{q25:.1f}" y="{middle - _BAR / 2:.1f}" '
            f'width="{max(q75 - q25, 1):.1f}" height="{_BAR}"/>',
            _line(q50, middle - _BAR / 2, q50, middle + _BAR / 2, "median"),
            _line(place(each.shift), middle - _ROW / 2, place(each.shift), middle + _ROW / 2, "b"),
        ]
    ends = ((low, "start"), (0.0, "middle"), (high, "end"))
    marks = [end for end in ends if end[1] != "middle" or low < -0.1 * span]
    parts += [
        f'<text x="{place(value):.1f}" y="{height - 4}" text-anchor="{anchor}">{value:.2f}</text>'
        for value, anchor in marks
    ]
    return (
        f'<svg class="correspondences" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="correspondences of pairs">{"".join(parts)}</svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{kind}" {place}/>'

"""Charts as SVG files of their own: a study's curves and interactions, and what others are made of.

Names and values come from settings and are escaped; a chart holds no script and loads nothing.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reports of masks do without torch
    from stego_core.metrics.study import Curve

_PANEL_W, _PANEL_H, _COLUMNS = 250, 170, 3
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 26, 26
_CELL, _MARGIN = 54, 150
INK, MUTED, _LINE, _BLUE = "#1b2028", "#5c6675", "#dfe3e9", "#2456b8"
_FONT = 'font-family="system-ui, sans-serif"'


def curves_svg(curves: Sequence[Curve], target: str) -> str:
    """Return small panels, one for each setting: mean score and standard deviation over seeds.

    All panels have the same scale, so that what matters looks steep. The ring marks the value of
    the job itself. Values stand side by side in their order, whatever their distance.

    Args:
        curves: what to draw; without any a note is drawn.
        target: name of the score.
    """
    low, high = _scale(curves)
    rows = -(-len(curves) // _COLUMNS)
    width, height = _COLUMNS * _PANEL_W, max(rows, 1) * _PANEL_H + 22
    parts = [text(8, 15, f"{target}: mean and standard deviation over seeds", size=13)]
    if not curves:
        parts.append(text(8, 60, "no trials were made one at a time", color=MUTED))
    for number, curve in enumerate(curves):
        x = number % _COLUMNS * _PANEL_W
        y = number // _COLUMNS * _PANEL_H + 22
        parts.append(f'<g transform="translate({x},{y})">{_panel(curve, low, high)}</g>')
    return svg(width, height, parts)


def heat_map_svg(shares: Mapping[str, float], pairs: Mapping[tuple[str, str], float]) -> str:
    """Return a matrix of settings: shares on the diagonal, what pairs add to them beside it.

    Args:
        shares: of each setting, in the order of the axes; below 0 is drawn as 0, NaN as a dash.
        pairs: interaction share of each pair, in either order.
    """
    paths = list(shares)
    side = _MARGIN + _CELL * len(paths)
    parts = []
    for row, first in enumerate(paths):
        y = _MARGIN + row * _CELL
        parts.append(text(_MARGIN - 6, y + _CELL / 2 + 4, first, anchor="end"))
        middle = y + _CELL / 2
        turn = f'transform="translate({middle + 4},{_MARGIN - 6}) rotate(-60)"'
        parts.append(f"<g {turn}>{text(0, 0, first)}</g>")
        for column, second in enumerate(paths):
            known = pairs.get((first, second), pairs.get((second, first), math.nan))
            value = shares[first] if row == column else known
            share = 0.0 if math.isnan(value) else value
            label = "–" if math.isnan(value) else f"{100 * min(max(share, 0.0), 1.0):.0f} %"
            x, size = _MARGIN + column * _CELL, _CELL - 2
            parts.append(heat_cell(x, y, share, label, size=size, is_own=row == column))
    return svg(side + 60, side + 8, parts)


def _panel(curve: Curve, low: float, high: float) -> str:
    inner_w, inner_h = _PANEL_W - _LEFT - _RIGHT, _PANEL_H - _TOP - _BOTTOM

    def place(index: int, value: float) -> tuple[float, float]:
        steps = max(len(curve.values) - 1, 1)
        x = _LEFT + inner_w * (0.06 + 0.88 * (index / steps if len(curve.values) > 1 else 0.5))
        return x, _TOP + inner_h * (high - value) / (high - low)

    parts = [text(_LEFT, _TOP - 9, curve.path, size=12)]
    for value in (low, (low + high) / 2, high):
        _, y = place(0, value)
        parts.append(f'<path d="M{_LEFT} {y:.1f}h{inner_w}" stroke="{_LINE}"/>')
        parts.append(text(_LEFT - 6, y + 4, f"{value:.3g}", anchor="end", color=MUTED, size=10))
    points = []
    for index, (mean, deviation) in enumerate(zip(curve.means, curve.deviations, strict=True)):
        x, _ = place(index, low)
        label = _shown(curve.values[index])
        parts.append(text(x, _PANEL_H - 9, label, anchor="middle", color=MUTED, size=10))
        if math.isnan(mean):
            continue
        spread = 0.0 if math.isnan(deviation) else deviation
        top, bottom = place(index, mean + spread)[1], place(index, mean - spread)[1]
        y = place(index, mean)[1]
        points.append(f"{x:.1f},{y:.1f}")
        parts.append(f'<path d="M{x:.1f} {top:.1f}V{bottom:.1f}" stroke="{_BLUE}" opacity=".45"/>')
        fill = "#fff" if index == curve.base else _BLUE
        radius = 4.5 if index == curve.base else 3
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{_BLUE}" '
            'stroke-width="1.6"/>'
        )
    line = f'<polyline points="{" ".join(points)}" fill="none" stroke="{_BLUE}"/>'
    return "".join([*parts[:1], line, *parts[1:]])


def heat_cell(
    x: float, y: float, share: float, label: str, *, size: float, is_own: bool = False
) -> str:
    """Return a square of a matrix, from white to blue, with its label.

    Args:
        x: left edge.
        y: upper edge.
        share: [0, 1]; others are cut to it.
        label: written into it.
        size: of its side.
        is_own: has a dark edge, as on the diagonal.
    """
    # By the square root: small shares are what has to be told apart.
    tint = math.sqrt(min(max(share, 0.0), 1.0))
    color = "#" + "".join(f"{round(255 - tint * (255 - end)):02x}" for end in (36, 86, 184))
    stroke = INK if is_own else _LINE
    return (
        f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{color}" stroke="{stroke}"/>'
        + text(
            x + size / 2,
            y + size / 2 + 4,
            label,
            anchor="middle",
            color="#fff" if tint > 0.55 else INK,
        )
    )


def _scale(curves: Sequence[Curve]) -> tuple[float, float]:
    ends = [
        mean + sign * (0.0 if math.isnan(deviation) else deviation)
        for curve in curves
        for mean, deviation in zip(curve.means, curve.deviations, strict=True)
        for sign in (-1, 1)
        if not math.isnan(mean)
    ]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    pad = 0.05 * (high - low) or 0.5
    return low - pad, high + pad


def _shown(value: Any) -> str:
    words = f"{value:g}" if isinstance(value, float) else str(value)
    return words if len(words) <= 14 else words[:13] + "…"


def text(
    x: float, y: float, words: str, *, anchor: str = "start", color: str = INK, size: int = 11
) -> str:
    """Return words as an element of a chart; they are escaped."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{color}">{html.escape(words)}</text>'
    )


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    """Return a chart of these elements."""
    # A background of its own: the file may be shown on a dark page.
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" {_FONT}>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )

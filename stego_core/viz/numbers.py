"""Numbers as the report shows them."""

from __future__ import annotations

import math


def percent(share: float) -> str:
    """Return a share of [0, 1] in percent with one decimal."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def number(value: float) -> str:
    """Return a number with four significant digits, thousands apart by narrow spaces."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    return text.replace(",", "\u202f")

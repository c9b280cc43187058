"""The masks of the worst images of an evaluation, as one figure: docs/results.md.

    python -m benchmarks.failures --masks runs/msrc-masks --metrics runs/msrc-eval --to worst.svg
        [--names building grass tree ...]

Names are those of the class ids from 0 on, where the data set has no `classes.txt`.

Masks alone, in the colours of their clusters: pictures and labels of the data sets are others'.
With the pictures at hand `report.py --metrics` shows more.
"""

from __future__ import annotations

import argparse
import base64
import json
import textwrap
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stego_core.viz.charts import MUTED, svg, text

_SHOWN, _COLUMNS = 8, 4
_WIDTH, _HEIGHT, _CAPTION, _GAP = 190, 130, 46, 12


def figure(rows: list[dict[str, Any]], masks: dict[str, bytes], names: dict[int, str]) -> str:
    """Return the figure.

    Args:
        rows: of `metrics/images.parquet`, the worst image first.
        masks: PNG of each image.
        names: of the classes.
    """
    shown = [row for row in rows if row["wrong_pixels"] and row["image_uri"] in masks][:_SHOWN]
    parts = []
    for number, row in enumerate(shown):
        x = _GAP + number % _COLUMNS * (_WIDTH + _GAP)
        y = _GAP + number // _COLUMNS * (_HEIGHT + _CAPTION + _GAP)
        data = base64.b64encode(masks[row["image_uri"]]).decode()
        parts.append(
            f'<image x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" '
            f'preserveAspectRatio="xMidYMid" href="data:image/png;base64,{data}"/>'
        )
        parts.append(text(x, y + _HEIGHT + 14, f"{row['accuracy']:.0f} % right"))
        for line, words in enumerate(textwrap.wrap(_error(row, names), 34)[:2]):
            parts.append(text(x, y + _HEIGHT + 28 + 13 * line, words, color=MUTED))
    lines = -(-len(shown) // _COLUMNS)
    width = _GAP + _COLUMNS * (_WIDTH + _GAP)
    return svg(width, _GAP + lines * (_HEIGHT + _CAPTION + _GAP), parts)


def _error(row: dict[str, Any], names: dict[int, str]) -> str:
    there = row["predicted_class"]
    place = "a cluster without class" if there is None else names.get(there, f"class {there}")
    true = names.get(row["true_class"], f"class {row['true_class']}")
    return f"{true} in {place}: {100 * row['wrong_pixels'] / row['pixels']:.0f} %"


def read_masks(folder: Path) -> dict[str, bytes]:
    """Return the PNG of each segmented image, by URI."""
    found = {}
    for part in sorted((folder / "masks").glob("*.parquet")):
        for row in pq.read_table(part, columns=["image_uri", "mask"]).to_pylist():
            if row["mask"] is not None:
                found[row["image_uri"]] = row["mask"]["bytes"]
    return found


def main() -> None:
    """Write the figure that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--masks", type=Path, required=True)
    parser.add_argument("--metrics", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--names", nargs="*", default=[])
    found = parser.parse_args()
    rows = pq.read_table(found.metrics / "metrics" / "images.parquet").to_pylist()
    told = json.loads((found.metrics / "protocol.json").read_text())
    names = dict(zip(told["classes"], told["class_names"], strict=True))
    names |= dict(enumerate(found.names))
    found.to.write_text(figure(rows, read_masks(found.masks), names))


if __name__ == "__main__":
    main()

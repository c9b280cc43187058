"""The table of a study that changes one setting at a time: docs/results.md.

    python -m benchmarks.ablation --kind own runs/ablation-own/{msrc_v2,voc12,camvid}

Each folder is the `--out` of `jobs/tune.py`, and named after its data set. The first setting of a
study is the job itself. Copies the tables of trials to benchmarks/results/<kind>-<set>.parquet;
given such files in place of folders, it reads those and copies nothing.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.common import kept_trials, spread


@dataclass(frozen=True, slots=True)
class Cell:
    """What one setting gave on one data set.

    Attributes:
        miou: of each seed, percent.
        accuracy: of each seed, percent.
        seconds: of each seed's trial, on one thread.
    """

    miou: tuple[float, ...]
    accuracy: tuple[float, ...]
    seconds: tuple[float, ...]


def read_cells(path: Path) -> dict[str, Cell]:
    """Return the finished settings of a table of trials, by the flag that makes each.

    Args:
        path: of `trials.parquet`.
    """
    rows = pq.read_table(path).to_pylist()
    settings = [name for name in rows[0] if "." in name]  # paths; other columns have plain names
    base = {name: rows[0][name] for name in settings}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "finished" and row["miou"] is not None:
            changed = [_flag(name, row[name]) for name in settings if row[name] != base[name]]
            found.setdefault(" ".join(changed) or "default", []).append(row)
    return {
        flags: Cell(
            *(tuple(row[name] for row in group) for name in ("miou", "accuracy", "seconds"))
        )
        for flags, group in found.items()
    }


def _flag(path: str, value: Any) -> str:
    name = path.replace("_", "-")
    if isinstance(value, bool):
        group, _, last = name.rpartition(".")
        return f"--{name}" if value else f"--{group}.no-{last}"
    return f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"


def table(sets: dict[str, dict[str, Cell]]) -> str:
    """Return one line of Markdown for each setting, with a column for each data set.

    The mean is that of all sets. Trials run beside others, so the quickest says most about time.

    Args:
        sets: of `read_cells`, by name of the data set.
    """
    lines = [
        "| | " + " | ".join(sets) + " | mean | seconds of the quickest trial |",
        "|---|" + "---|" * (len(sets) + 2),
    ]
    for flags in dict.fromkeys(flags for cells in sets.values() for flags in cells):
        cells = [one.get(flags) for one in sets.values()]
        seconds = [s for cell in cells if cell for s in cell.seconds]
        shown = " | ".join("–" if cell is None else spread(cell.miou) for cell in cells)
        name = flags if flags == "default" else f"`{flags}`"
        means = [statistics.fmean(cell.miou) for cell in cells if cell]
        mean = f"{statistics.fmean(means):.1f}" if len(means) == len(cells) else "–"
        lines.append(f"| {name} | {shown} | {mean} | {min(seconds):.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the studies, keep their trials, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("studies", type=Path, nargs="+")
    parser.add_argument("--kind", required=True, help="how the copies are named")
    found = parser.parse_args()
    tables = kept_trials(found.kind, found.studies)
    print(table({name: read_cells(path) for name, path in tables.items()}))


if __name__ == "__main__":
    main()

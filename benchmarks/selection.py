"""How well criteria without labels choose a state of a training: docs/results.md.

    python -m benchmarks.selection runs/states/msrc_v2 runs/states/voc12 runs/states/camvid

Each folder is the `--out` of `jobs/tune.py` with configs/states-tune.toml, and named after its data
set. Copies the tables of trials to benchmarks/results/states-<set>.parquet; given such files in
place of folders, it reads those and copies nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.common import kept_trials, spread
from stego_core.metrics.criterion import rank_correlation

CRITERIA = ("agreement", "stability", "margin")
USUAL_STEPS = 300  # of the default

Training = list[dict[str, Any]]
"""The states of one training: `steps`, `miou` and the criteria of each."""


def read_trainings(path: Path) -> list[Training]:
    """Return the trainings of a table of trials, one for each seed, in the order of their seeds.

    A training without its usual state (a trial failed) is left out.

    Args:
        path: of `trials.parquet`.
    """
    found: dict[int, Training] = {}
    for row in pq.read_table(path).to_pylist():
        if row["status"] == "finished" and row["miou"] is not None:
            found.setdefault(row["seed"], []).append(row)
    trainings = [sorted(found[seed], key=itemgetter("steps")) for seed in sorted(found)]
    return [one for one in trainings if any(row["steps"] == USUAL_STEPS for row in one)]


def correlation(criterion: str, training: Training) -> float:
    """Return Spearman's rank correlation of a criterion with mIoU over the states."""
    values = [row[criterion] for row in training]
    return rank_correlation(values, [row["miou"] for row in training])


def chosen(training: Training, key: Callable[[dict[str, Any]], float]) -> float:
    """Return the mIoU of the state that `key` likes best."""
    return float(max(training, key=key)["miou"])


def table(sets: dict[str, list[Training]]) -> str:
    """Return one line of Markdown for each way to choose, with a column for each data set.

    Args:
        sets: trainings by name of the data set.
    """
    ways: list[tuple[str, str, Callable[[dict[str, Any]], float]]] = []
    for name in CRITERIA:
        each = [correlation(name, one) for trainings in sets.values() for one in trainings]
        shown = f"{statistics.fmean(each):.2f} ± {statistics.stdev(each):.2f}"
        ways.append((f"`{name}`", shown, itemgetter(name)))
    ways.append((f"after {USUAL_STEPS} steps", "", lambda row: row["steps"] == USUAL_STEPS))
    ways.append(("the best by labels", "", itemgetter("miou")))
    lines = ["| | correlation | " + " | ".join(sets) + " |", "|---|---|" + "---|" * len(sets)]
    for title, shown, key in ways:
        cells = [spread([chosen(one, key) for one in trainings]) for trainings in sets.values()]
        lines.append(f"| {title} | {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the studies, keep their trials, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("studies", type=Path, nargs="+")
    tables = kept_trials("states", parser.parse_args().studies)
    print(table({name: read_trainings(path) for name, path in tables.items()}))


if __name__ == "__main__":
    main()

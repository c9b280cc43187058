"""How well criteria without labels choose a state of a training: docs/results.md.

    python -m benchmarks.selection runs/states/msrc_v2 runs/states/voc12 runs/states/camvid

Each folder is the `--out` of `jobs/tune.py` with configs/states-tune.toml, and named after its data
set. Copies the tables of trials to benchmarks/results/states-<set>.parquet; given such files in
place of folders, it reads those and copies nothing.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from scipy.stats import spearmanr

RESULTS = Path(__file__).resolve().parent / "results"
CRITERIA = ("agreement", "stability", "margin")
USUAL_STEPS = 300  # of the default

Training = list[dict[str, Any]]
"""The states of one training: `steps`, `miou` and the criteria of each."""


def read_trainings(path: Path) -> list[Training]:
    """Return the trainings of a table of trials, one for each seed, in the order of their seeds.

    Args:
        path: of `trials.parquet`.
    """
    found: dict[int, Training] = {}
    for row in pq.read_table(path).to_pylist():
        if row["status"] == "finished" and row["miou"] is not None:
            found.setdefault(row["seed"], []).append(row)
    return [sorted(found[seed], key=lambda row: row["steps"]) for seed in sorted(found)]


def correlation(criterion: str, training: Training) -> float:
    """Return Spearman's rank correlation of a criterion with mIoU over the states."""
    result = spearmanr([row[criterion] for row in training], [row["miou"] for row in training])
    return float(result.statistic)


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
        ways.append((f"`{name}`", shown, lambda row, name=name: row[name]))  # type: ignore[misc]
    ways.append((f"after {USUAL_STEPS} steps", "", lambda row: row["steps"] == USUAL_STEPS))
    ways.append(("the best by labels", "", lambda row: row["miou"]))
    lines = ["| | correlation | " + " | ".join(sets) + " |", "|---|---|" + "---|" * len(sets)]
    for title, shown, key in ways:
        cells = [_spread([chosen(one, key) for one in trainings]) for trainings in sets.values()]
        lines.append(f"| {title} | {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    """Read the studies, keep their trials, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("studies", type=Path, nargs="+")
    sets: dict[str, list[Training]] = {}
    for study in parser.parse_args().studies:
        name, path = study.stem.removeprefix("states-"), study
        if study.is_dir():
            path = RESULTS / f"states-{study.name}.parquet"
            shutil.copyfile(study / "trials.parquet", path)
        sets[name] = read_trainings(path)
    print(table(sets))


if __name__ == "__main__":
    main()

"""What the table of criteria says of trainings whose best states are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.selection import correlation, read_trainings, table


def state(seed: int, steps: int, miou: float | None, **criteria: float) -> dict[str, Any]:
    row = {"seed": seed, "steps": steps, "status": "finished", "miou": miou}
    return row | {"agreement": 0.5, "stability": miou or 0.0, "margin": -(miou or 0.0)} | criteria


@pytest.fixture
def study(tmp_path: Path) -> Path:
    second = ((300, 30.0), (0, 31.0), (600, 29.0))
    first = ((600, 20.0), (300, 28.0), (75, 29.0))
    rows = [
        *(state(1, steps, miou, agreement=miou**2) for steps, miou in second),
        *(state(0, steps, miou, agreement=steps) for steps, miou in first),
        state(0, 150, None) | {"status": "failed"},
        state(2, 0, 99.0),  # the usual state of this training failed
        state(2, 300, None) | {"status": "failed"},
    ]
    path = tmp_path / "trials.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_trainings_are_told_apart_by_seed_and_failed_states_left_out(study: Path) -> None:
    steps = [[row["steps"] for row in training] for training in read_trainings(study)]
    assert steps == [[75, 300, 600], [0, 300, 600]]


def test_ranks_are_correlated_inside_a_training(study: Path) -> None:
    first, second = read_trainings(study)
    assert [correlation("agreement", each) for each in (first, second)] == [-1, 1]
    assert correlation("stability", first) == 1
    assert correlation("margin", second) == -1


def test_each_way_to_choose_has_its_line(study: Path) -> None:
    lines = table({"one": read_trainings(study)}).splitlines()
    assert lines[0] == "| | correlation | one |"
    assert lines[2:] == [
        "| `agreement` | 0.00 ± 1.41 | 25.5 ± 7.8 |",  # states of 20 and 31
        "| `stability` | 1.00 ± 0.00 | 30.0 ± 1.4 |",
        "| `margin` | -1.00 ± 0.00 | 24.5 ± 6.4 |",
        "| after 300 steps |  | 29.0 ± 1.4 |",
        "| the best by labels |  | 30.0 ± 1.4 |",
    ]

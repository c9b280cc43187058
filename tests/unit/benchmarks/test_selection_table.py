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
    rows = [
        *(state(1, steps, miou, agreement=miou**2) for steps, miou in ((300, 30.0), (0, 31.0))),
        *(state(0, steps, miou, agreement=steps) for steps, miou in ((600, 20.0), (300, 28.0))),
        state(0, 75, None) | {"status": "failed"},
    ]
    path = tmp_path / "trials.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_trainings_are_told_apart_by_seed_and_failed_states_left_out(study: Path) -> None:
    trainings = read_trainings(study)
    assert [[row["steps"] for row in training] for training in trainings] == [[300, 600], [0, 300]]


def test_ranks_are_correlated_inside_a_training(study: Path) -> None:
    first, second = read_trainings(study)
    assert [correlation("agreement", each) for each in (first, second)] == pytest.approx([-1, 1])
    assert correlation("stability", first) == pytest.approx(1)
    assert correlation("margin", second) == pytest.approx(-1)


def test_each_way_to_choose_has_its_line(study: Path) -> None:
    lines = table({"one": read_trainings(study)}).splitlines()
    assert lines[0] == "| | correlation | one |"
    assert lines[2:] == [
        "| `agreement` | 0.00 ± 1.41 | 25.5 ± 7.8 |",  # states of 20 and 31
        "| `stability` | 1.00 ± 0.00 | 29.5 ± 2.1 |",
        "| `margin` | -1.00 ± 0.00 | 25.0 ± 7.1 |",
        "| after 300 steps |  | 29.0 ± 1.4 |",
        "| the best by labels |  | 29.5 ± 2.1 |",
    ]

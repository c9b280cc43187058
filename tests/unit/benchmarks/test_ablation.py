"""The table of an ablation: which flag a row is of, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.ablation import read_cells, table

BASE = {"loss.energy": "correspondence", "train.ema": 0.0, "head.consistent": True}


def trial(seed: int, miou: float | None, **changes: Any) -> dict[str, Any]:
    settings = BASE | {name.replace("__", "."): value for name, value in changes.items()}
    row: dict[str, Any] = {"trial": "t", "setting": str(changes), "seed": seed, "steps": 300}
    row |= {"samplers": "one-at-a-time", "status": "finished", "seconds": 10.0 + seed}
    row |= {"error": None} | settings | {"agreement": 0.5, "stability": 0.1, "margin": 0.2}
    return row | {"miou": miou, "accuracy": 50.0}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    rows = [
        *(trial(seed, 30.0 + seed) for seed in range(3)),
        *(trial(seed, 20.0, train__ema=0.99) for seed in range(3)),
        trial(0, 11.0, head__consistent=False),
        trial(0, None, loss__energy="smooth") | {"status": "failed"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "trials.parquet")
    return tmp_path / "trials.parquet"


def test_rows_are_named_by_the_flags_that_make_them_and_failed_trials_left_out(study: Path) -> None:
    cells = read_cells(study)
    assert list(cells) == ["default", "--train.ema 0.99", "--head.no-consistent"]
    assert cells["default"].miou == (30.0, 31.0, 32.0)
    assert cells["default"].seconds == (10.0, 11.0, 12.0)


def test_the_table_has_mean_deviation_and_seconds_and_a_dash_for_what_was_not_run(
    study: Path,
) -> None:
    cells = read_cells(study)
    lines = table({"a": cells, "b": {"default": cells["default"]}}).splitlines()
    assert lines[0] == "| | a | b | mean | seconds of the quickest trial |"
    assert lines[2] == "| default | 31.0 ± 1.0 | 31.0 ± 1.0 | 31.0 | 10 |"
    assert lines[3] == "| `--train.ema 0.99` | 20.0 ± 0.0 | – | – | 10 |"
    assert lines[4] == "| `--head.no-consistent` | 11.0 | – | – | 10 |"

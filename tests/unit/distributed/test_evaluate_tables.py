"""The golden confusion (stego-method.md, 6.2) through the tables that evaluation writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stego_core.config.compat import EvaluateCompat
from stego_core.config.schema import DataConfig, EvaluateJob
from stego_core.datasets.directory import Dataset
from stego_core.distributed.evaluate_stages import MAX_CLASSES
from stego_core.distributed.evaluate_tables import Counted, write_tables
from stego_core.model.segmenter import CLUSTER
from stego_core.storage.run import RunDirectory

# [cluster, class]; no pixel has the last class, and five are predicted as it.
GOLDEN = np.array([[5, 40, 0, 0], [30, 10, 5, 0], [2, 3, 0, 0], [0, 0, 5, 0]])
NAMES = ("grass", "road", "sky", "water")


def scores(folder: Path, clusters: list[int], job: EvaluateJob) -> tuple[float, float]:
    confusion = np.zeros((MAX_CLASSES, 4), np.int64)
    confusion[:4] = GOLDEN[clusters].T
    dataset = Dataset("imgs/val", "labels/val", NAMES)
    run = RunDirectory(str(folder), job="evaluate")
    counted = Counted(totals={CLUSTER: confusion}, precision="fp32")
    write_tables(replace(job, out=run.uri), run, dataset, counted)
    told = json.loads((folder / "metrics.json").read_text())
    return told["cluster.miou"], told["cluster.accuracy"]


@pytest.mark.parametrize("dropped_extra", [False, True])
@pytest.mark.parametrize("clusters", [[0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 1, 0]])
def test_the_golden_scores_in_any_order_of_clusters(
    clusters: list[int], *, dropped_extra: bool, tmp_path: Path
) -> None:
    job = EvaluateJob(compat=EvaluateCompat(dropped_extra_clusters=dropped_extra))
    assert scores(tmp_path, clusters, job) == pytest.approx((44.1645, 75.0), abs=5e-5)


def test_classes_that_are_chosen_are_the_only_ones(tmp_path: Path) -> None:
    job = EvaluateJob(data=DataConfig(score_classes=(0, 1, 2)))
    miou, _ = scores(tmp_path, [0, 1, 2, 3], job)
    assert miou == pytest.approx(44.1645 * 4 / 3, abs=5e-4)

"""The options of docs/options.md through the jobs, several at once, on drawn pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from ray_cluster import SEGMENT, TRAIN, Cluster
from safetensors.numpy import load_file

pytestmark = pytest.mark.ray

OPTIONS = [
    *("--train.ema", "0.8", "--loss.energy", "smooth", "--loss.shifts", "adaptive"),
    *("--loss.local", "0.2", "--clusters.count", "0", "--clusters.over", "2", "--workers", "2"),
    *("--train.select", "agreement"),
    *("--head.kind", "transformer", "--clusters.boost", "primaps"),
]


def test_a_model_of_many_options_trains_on_two_workers_and_segments(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "masks"
    train = ["train.py", "--data.root", str(data), "--out", str(run), *TRAIN, *OPTIONS]
    cluster.run(*train)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (choice,) = [event for event in events if event["event"] == "clusters/count"]
    scores = {row["count"]: row["agreement"] for row in choice["candidates"]}
    best = max(scores.values())
    assert choice["count"] == max(n for n, score in scores.items() if score >= 0.95 * best)
    last = [event for event in events if event["event"] == "train/step"][-1]
    assert np.isfinite([last[f"loss/{name}"] for name in ("self", "random", "local")]).all()
    assert "loss/knn" not in last
    tensors = load_file(run / "model" / "model.safetensors")
    assert any(name.startswith("head.block.") for name in tensors)
    assert len(tensors["clusters"]) == len(tensors["merge"]) == 2 * choice["count"]
    assert set(tensors["merge"]) == set(range(choice["count"]))
    judged = [event for event in events if event["event"] == "train/candidate"]
    assert [event["step"] for event in judged] == [0, 10, 20, 30]
    card = json.loads((run / "model" / "model.json").read_text())
    chosen = max(judged, key=lambda event: event["agreement"])
    assert card["training"]["steps"] == chosen["step"]
    plan = cluster.run(*train, "--dry-run")
    assert f"{choice['count']} clusters (chosen, see" in plan.stdout + plan.stderr
    common = ["--input", str(data / "imgs" / "val"), "--model", str(run), *SEGMENT]
    cluster.run("segment_bucket.py", *common, "--out", str(out))
    rows = pq.read_table(out / "masks").to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    assert {c["cluster"] for row in rows for c in row["clusters"]} <= set(range(choice["count"]))

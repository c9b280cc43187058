"""The neighbour search on actors: shards of the gallery, blocks of queries."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray_cluster import TINY, Cluster

pytestmark = pytest.mark.ray
MINE = [*TINY, "--views.resolution", "64"]


def test_a_sharded_search_finds_the_neighbours_of_one_that_is_not(
    cluster: Cluster, data: Path, model: Path, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path), "--neighbors.shard-views", "13"]
    others, stale = (tmp_path / "neighbors" / name for name in ("notes.txt", "part-00009.parquet"))
    others.parent.mkdir()
    others.write_text("a user's own")
    stale.write_bytes(b"of another search")
    cluster.run("mine_neighbors.py", "--data.root", str(data), *MINE, *out)
    parts = sorted((tmp_path / "neighbors").glob("*.parquet"))
    assert len(parts) == 4
    assert others.read_text() == "a user's own"
    whole = pq.read_table(sorted((model / "neighbors").glob("*.parquet")))
    assert pq.read_table(parts).equals(whole)


def test_an_approximate_search_leaves_its_recall_in_the_record(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("faiss")
    ivf = ["--neighbors.method", "ivf-flat", "--neighbors.lists", "1", "--out", str(tmp_path)]
    done = cluster.run("mine_neighbors.py", "--data.root", str(data), *MINE, *ivf)
    search = json.loads((tmp_path / "mine.json").read_text())["search"]
    assert search["method"] == "ivf-flat"
    assert search["recall_views"] == 40
    assert search["recall_used"] == search["recall_stored"] == 1  # its only list is all
    assert "recall of ivf-flat against exact" in done.stderr

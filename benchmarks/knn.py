"""Exact nearest neighbours against the machine's own matrix product, and their memory at 1 M."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

from benchmarks.common import Options, Row, run

_VIEWS, _DIM, _NEIGHBORS = 100_000, 384, 30
_QUERIES = 8192  # one query block of the job; each is compared with the whole gallery
_MANY, _TILE_BYTES = 1_000_000, 64 * 2**20


def _rows(count: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = torch.empty(count, _DIM)
    for start in range(0, count, 2**16):  # in pieces: the peak is to be the search's
        part = rows[start : start + 2**16]
        part.normal_(generator=generator)
        part /= part.norm(dim=1, keepdim=True)
    return rows


def _search(rows: Any, queries: int, precision: str) -> Any:
    import torch

    from stego_core.neighbors.search import exact_top_k

    own = torch.arange(len(rows))
    return exact_top_k(
        rows[:queries],
        rows,
        _NEIGHBORS,
        query_groups_Q=own[:queries],
        gallery_groups_G=own,
        tile_bytes=_TILE_BYTES,
        precision=precision,  # type: ignore[arg-type]
    )


def _product_s(rows: Any) -> float:
    """Return how long float32 products of the same size take, tile by tile, nothing kept."""
    import torch

    tile, columns = 512, 32768
    out = torch.empty(tile * columns)
    started_s = time.perf_counter()
    for offset in range(0, len(rows), columns):
        block = rows[offset : offset + columns].T
        view = out[: tile * block.shape[1]].view(tile, -1)
        for start in range(0, _QUERIES, tile):
            torch.mm(rows[start : start + tile], block, out=view)
    return time.perf_counter() - started_s


def _peak() -> dict[str, float]:
    """Return the bytes that a search in a gallery of a million adds to the gallery itself."""
    import torch

    rows = _rows(_MANY)
    _search(rows[:4096], 8, "fp32")  # libraries and threads are no part of the search
    torch.arange(_MANY)
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _search(rows, _QUERIES, "fp32")
    after = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"added_bytes": after - before, "gallery_bytes": rows.nbytes, "peak_bytes": after}


def _bound() -> int:
    from stego_core.config.neighbors import NeighborsConfig
    from stego_core.neighbors.plan import plan_search

    config = NeighborsConfig(stored=_NEIGHBORS, tile_bytes=_TILE_BYTES)
    return plan_search(config, _MANY, _DIM).actor_bytes


def measure(options: Options) -> list[Row]:
    """Return the rows of the table."""
    rows = _rows(_VIEWS)
    _product_s(rows[:32768])
    ratios: dict[str, list[float]] = {"fp32": [], "bf16": []}
    times: dict[str, list[float]] = {"product": [], "fp32": [], "bf16": []}
    for _ in range(options.repeats):
        product_s = _product_s(rows)
        times["product"].append(product_s)
        for precision, found in ratios.items():
            started_s = time.perf_counter()
            _search(rows, _QUERIES, precision)
            times[precision].append(time.perf_counter() - started_s)
            found.append(product_s / times[precision][-1])
    # A process of its own: the peak of a process never falls.
    command = [sys.executable, "-m", "benchmarks.knn", "--peak"]
    peak = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    facts = {"views": _VIEWS, "dim": _DIM, "k": _NEIGHBORS, "queries": _QUERIES, "seconds": times}
    faster = [a / b for a, b in zip(times["fp32"], times["bf16"], strict=True)]
    against = "the machine's fp32 matrix products of that size"
    what = "exact KNN, 100 k x 384"
    return [
        Row(f"{what}, fp32", against, 0.6, ratios["fp32"], unit="%", facts=facts),
        Row(f"{what}, bf16", "the same in fp32", 1, faster, facts={"of_product": ratios["bf16"]}),
        Row(
            "KNN memory beside the gallery, 1 M x 384",
            "the bound that --dry-run states",
            1,
            [peak["added_bytes"] / _bound()],
            direction="at most",
            facts=peak | {"bound_bytes": _bound()},
        ),
    ]


if __name__ == "__main__":
    if "--peak" in sys.argv:
        print(json.dumps(_peak()))
    else:
        run("knn", __doc__, measure)

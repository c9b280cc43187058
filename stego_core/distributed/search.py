"""Nearest neighbours of all views: query blocks are searched by Ray tasks, one file each."""

from __future__ import annotations

import logging
import time

import ray
import torch

from stego_core.config.compat import MineCompat
from stego_core.config.load import fingerprint
from stego_core.config.schema import MineJob, NeighborsConfig
from stego_core.neighbors.search import exact_top_k, skip_first
from stego_core.neighbors.table import write_part
from stego_core.storage import fs
from stego_core.storage.feature_store import Views
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)

_QUERY_BLOCK = 8192  # views whose neighbours one task searches


def _search_block(
    views: Views, start: int, uri: str, *, config: NeighborsConfig, compat: MineCompat, key: str
) -> int:
    rows = slice(start, start + _QUERY_BLOCK)
    embeddings = torch.from_numpy(views.embeddings.copy())
    # A view is never its own neighbour; with `exclude_own` no view of its image is.
    own = torch.arange(len(embeddings))
    groups = torch.from_numpy(views.image_ids.copy()) if config.exclude_own else own
    scores, indices = exact_top_k(
        embeddings[rows],
        embeddings,
        config.stored,
        query_groups_Q=groups[rows],
        gallery_groups_G=groups,
        tile_bytes=config.tile_bytes,
    )
    if compat.skip_first_neighbor:
        scores, indices = skip_first((scores, indices), embeddings[rows], own[rows], config.stored)
    write_part(uri, views, rows, scores.numpy(), indices.numpy(), key=key)
    return len(scores)


def search_neighbors(job: MineJob, run: RunDirectory, views: Views, *, key: str) -> None:
    """Write the neighbours table of all views, unless it is there for this key.

    Args:
        job: the settings.
        run: the run directory; the table goes to `neighbors/`.
        views: all views with their embeddings.
        key: fingerprint of the embeddings.
    """
    options = (job.neighbors.stored, job.neighbors.exclude_own, job.compat.skip_first_neighbor)
    search_key = fingerprint(key, *options)
    current = run.read_json("neighbors/key.json") or {}
    if current.get("key") == search_key:
        return
    started_s = time.monotonic()
    run.status("running", stage="search")
    fs.delete(run.path("neighbors"))
    reference = ray.put(views)
    search = ray.remote(num_cpus=1)(_search_block)
    tasks = [
        search.remote(
            reference,
            start,
            run.path("neighbors", f"part-{part:05d}.parquet"),
            config=job.neighbors,
            key=key,
            compat=job.compat,
        )
        for part, start in enumerate(range(0, len(views.image_ids), _QUERY_BLOCK))
    ]
    found = sum(ray.get(tasks))
    # Written last: without it the table is not complete.
    run.write_json("neighbors/key.json", {"key": search_key, "features": key})
    elapsed_s = time.monotonic() - started_s
    run.event("search/done", views=found, elapsed_s=round(elapsed_s, 3))
    logger.info("neighbours of %d views in %.1f s", found, elapsed_s)

"""Nearest neighbours of all views: gallery shards on Ray actors, query blocks, merged lists.

An actor holds one shard of the gallery. Every query block is searched in every shard, its lists
are merged, and the result is written to one file. How the gallery is cut follows from the settings
alone; the number of actors decides only who searches what.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from stego_core.config.load import fingerprint
from stego_core.config.neighbors import search_settings
from stego_core.config.schema import MineJob
from stego_core.distributed.cluster import plan_actors
from stego_core.distributed.search_stages import (
    ShardSearcher,
    merge,
    search_shard,
    view_groups,
    write,
)
from stego_core.errors import ClusterError
from stego_core.neighbors.faiss_index import code_bytes, train_index, training_rows
from stego_core.neighbors.plan import QUERY_BLOCK, SearchPlan, plan_search
from stego_core.neighbors.recall import recall, sample_views
from stego_core.neighbors.table import is_part
from stego_core.storage import fs
from stego_core.storage.feature_store import Views
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)

_RETRIES = 3  # of an actor that dies, and of a call that was lost with it


Query = tuple[Any, Any, slice]  # embeddings and groups of a shard, and which rows of them


@dataclass(frozen=True, slots=True)
class Shard:
    """A run of views in the object store.

    Attributes:
        start: its first view.
        rows: views.
        embeddings: reference to (rows, D) float32.
        groups: reference to (rows,) int64; views of one group are never neighbours.
    """

    start: int
    rows: int
    embeddings: Any
    groups: Any


def search_neighbors(job: MineJob, run: RunDirectory, views: Views, *, key: str) -> dict[str, Any]:
    """Write the neighbours table of all views, unless it is there for this key.

    Args:
        job: the settings.
        run: the run directory; the table goes to `neighbors/`.
        views: all views with their embeddings.
        key: fingerprint of the embeddings.

    Returns:
        What the run's record says of the search: method, and recall where it is not exact.
    """
    plan = plan_search(job.neighbors, *views.embeddings.shape)
    seed = job.seed if plan.method in ("ivf-flat", "ivf-pq") else None
    options = (search_settings(job.neighbors), job.compat.skip_first_neighbor, seed)
    codes = [code_bytes(views.embeddings.shape[1])] if plan.method == "ivf-pq" else []
    search_key = fingerprint(key, *options, *codes)
    current = run.read_json("neighbors/key.json") or {}
    if current.get("key") == search_key:
        return dict(current["search"])
    if plan.reason:
        logger.info("%s: searching exactly", plan.reason)
    started_s = time.monotonic()
    run.status("running", stage="search")
    _drop_table(run)
    record: dict[str, Any] = {"method": plan.method, "asked": job.neighbors.method}
    try:
        found = _Searchers(job, views, plan)
        found.write_table(run, key=key)
        record |= found.recall() if plan.method != "exact" else {}
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ClusterError(f"the search for neighbours failed, last: {reason}") from error
    if plan.method != "exact":
        logger.info(
            "recall of %s against exact on %d views: %.4f of the nearest %d, %.4f of %d",
            *(plan.method, record["recall_views"], record["recall_used"], job.neighbors.used),
            *(record["recall_stored"], job.neighbors.stored),
        )
    # Written last: without it the table is not complete.
    run.write_json("neighbors/key.json", {"key": search_key, "features": key, "search": record})
    elapsed_s = time.monotonic() - started_s
    count = len(views.image_ids)
    run.event("search/done", views=count, elapsed_s=round(elapsed_s, 3), **record)
    logger.info("neighbours of %d views in %.1f s (%s)", count, elapsed_s, plan.method)
    return record


def _drop_table(run: RunDirectory) -> None:
    """Delete the table of other embeddings, and no other file: the folder may hold a user's."""
    fs.delete(run.path("neighbors/key.json"))  # first what says that the table is complete
    for name in filter(is_part, fs.list_names(run.path("neighbors"))):
        fs.delete(run.path("neighbors", name))


class _Searchers:
    """All shards in the object store, and the actors that search them.

    Args:
        job: the settings.
        views: all views.
        plan: of the search.
    """

    def __init__(self, job: MineJob, views: Views, plan: SearchPlan) -> None:
        self._job, self._views, self._plan = job, views, plan
        self._groups = view_groups(views, exclude_own=job.neighbors.exclude_own)
        groups, step = self._groups, job.neighbors.shard_views
        self._shards = [
            Shard(
                start,
                len(groups[start : start + step]),
                ray.put(np.ascontiguousarray(views.embeddings[start : start + step])),
                ray.put(np.ascontiguousarray(groups[start : start + step])),
            )
            for start in range(0, len(groups), step)
        ]
        actors = plan_actors(job.workers, at_least=job.min_workers)
        cpus = math.floor(ray.cluster_resources().get("CPU", 1))
        # Half of the CPU that each computes on: when nodes are lost, the others have room.
        spread = {"num_cpus": 0.5, "scheduling_strategy": "SPREAD"}
        self._resources: dict[str, Any] = {"num_gpus": 1} if actors.num_gpus else spread
        self._count = actors.count if actors.num_gpus else max(1, cpus)
        self._device = actors.device
        self._trained = self._train() if plan.method != "exact" else None

    def _train(self) -> Any:
        rows = training_rows(self._plan.method, self._plan.lists)
        sample = self._views.embeddings[
            sample_views(len(self._views.embeddings), rows, seed=self._job.seed)
        ]
        train = ray.remote(num_cpus=1)(train_index)
        options = {"lists": self._plan.lists, "seed": self._job.seed}
        return train.remote(sample, self._plan.method, **options)

    def _blocks(self) -> list[tuple[Shard, slice]]:
        """Return all query blocks: rows of shards."""
        return [
            (shard, slice(row, min(row + QUERY_BLOCK, shard.rows)))
            for shard in self._shards
            for row in range(0, shard.rows, QUERY_BLOCK)
        ]

    def _waves(self, num_blocks: int) -> list[list[tuple[Shard, int]]]:
        """Return which shards are searched at a time, each with its number of actors."""
        step = min(self._count, len(self._shards))
        waves = [self._shards[i : i + step] for i in range(0, len(self._shards), step)]
        return [
            [(shard, max(1, min(num_blocks, self._count // len(wave)))) for shard in wave]
            for wave in waves
        ]

    def _shard_arguments(self, shard: Shard) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (shard.embeddings, shard.groups), {
            "start": shard.start,
            "config": self._job.neighbors,
            "device": self._device,
            "trained": self._trained,
        }

    def _start(self, shard: Shard, count: int) -> list[Any]:
        actor = ray.remote(max_restarts=_RETRIES, max_task_retries=_RETRIES, **self._resources)(
            ShardSearcher
        )
        places, options = self._shard_arguments(shard)
        return [actor.remote(*places, **options) for _ in range(count)]

    def _one_block(self, queries: Query, *, is_exact: bool) -> Any:
        """Return a reference to the merged lists of a single block of queries.

        A task may run in a process that has torch loaded already; an actor would start one.
        """
        search = ray.remote(max_retries=_RETRIES, **self._resources)(search_shard)
        parts = []
        for shard in self._shards:
            places, options = self._shard_arguments(shard)
            parts.append(search.remote(*queries, *places, is_exact=is_exact, **options))
        return self._merged(parts)

    def _merged(self, parts: list[Any]) -> Any:
        if len(parts) == 1:
            return parts[0]
        return ray.remote(num_cpus=0)(merge).remote(self._job.neighbors.stored, *parts)

    def _lists(self, queries: list[Query], *, is_exact: bool = False) -> list[Any]:
        """Return a reference to the merged lists of each block of queries."""
        if len(queries) == 1:
            return [self._one_block(queries[0], is_exact=is_exact)]
        best: list[list[Any]] = [[] for _ in queries]
        for wave in self._waves(len(queries)):
            actors = [self._start(shard, count) for shard, count in wave]
            for i, block in enumerate(queries):
                parts = [
                    replicas[i % len(replicas)].top_k.remote(*block, is_exact=is_exact)
                    for replicas in actors
                ]
                best[i] = [self._merged(best[i] + parts)]
            # The actors end with their handles: not before they are done.
            found = [one for (one,) in best]
            ray.wait(found, num_returns=len(found), fetch_local=False)
        return found

    def write_table(self, run: RunDirectory, *, key: str) -> None:
        """Search all views and write `neighbors/part-*.parquet`."""
        blocks = self._blocks()
        lists = self._lists([(shard.embeddings, shard.groups, rows) for shard, rows in blocks])
        ids, skip = _identities(self._views), self._job.compat.skip_first_neighbor
        k = self._job.neighbors.stored
        uris = [run.path("neighbors", f"part-{part:05d}.parquet") for part in range(len(blocks))]
        if len(blocks) == 1:  # here, where torch is loaded already
            (shard, rows), (uri,) = blocks[0], uris
            vectors = self._views.embeddings if skip else None
            found = ray.get(lists[0])
            write(found, ids, vectors, rows, start=shard.start, k=k, uri=uri, key=key)
            return
        shared, write_block = ray.put(ids), ray.remote(num_cpus=0)(write)
        tasks = [
            write_block.remote(
                found,
                shared,
                shard.embeddings if skip else None,
                rows,
                start=shard.start,
                k=k,
                uri=uri,
                key=key,
            )
            for found, (shard, rows), uri in zip(lists, blocks, uris, strict=True)
        ]
        ray.get(tasks)

    def recall(self) -> dict[str, Any]:
        """Return the recall of the search against the exact one, on a sample of the views."""
        sample = sample_views(len(self._views.embeddings), None, seed=self._job.seed)
        whole = slice(0, len(sample))
        queries = [(self._views.embeddings[sample], self._groups[sample], whole)]
        (found,), (exact,) = self._lists(queries), self._lists(queries, is_exact=True)
        (_, found_views), (_, exact_views) = ray.get([found, exact])
        used = self._job.neighbors.used
        return {
            "recall_views": len(sample),
            "recall_used": round(recall(found_views[:, :used], exact_views[:, :used]), 6),
            "recall_stored": round(recall(found_views, exact_views), 6),
        }


def _identities(views: Views) -> Views:
    """Return the views without their vectors: what a part of the table needs of them."""
    return Views(views.image_ids, views.crops, np.empty((0, 0), np.float32), [])

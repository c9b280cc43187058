"""Which search a number of views gets, how it is cut, and what memory it takes."""

from __future__ import annotations

from dataclasses import dataclass

from stego_core.config.neighbors import NeighborsConfig, SearchMethod
from stego_core.neighbors.faiss_index import (
    CODES,
    POINTS_PER_LIST,
    code_bytes,
    import_faiss,
    num_lists,
)

QUERY_BLOCK = 8192  # views whose neighbours are searched in one go and written to one file
_TILES = 3  # of `tile_bytes`: scores, the block of the gallery, copies of candidates
_CANDIDATE_BYTES = 12  # score and index


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """How the neighbours of some views are searched.

    Attributes:
        method: what is done, which may not be what was asked for.
        reason: why not, or an empty string.
        lists: of the inverted file; 0 for other methods.
        num_shards: parts of the gallery.
        store_bytes: embeddings in the object store of each node, shared by its actors.
        actor_bytes: beyond that, of one actor.
    """

    method: SearchMethod
    reason: str
    lists: int
    num_shards: int
    store_bytes: int
    actor_bytes: int

    def line(self, config: NeighborsConfig) -> str:
        """Return the plan as `--dry-run` prints it."""
        details = f", {self.lists} lists, {config.probes} probed" if self.lists else ""
        shards = "1 shard" if self.num_shards == 1 else f"{self.num_shards} shards"
        why = f" ({self.reason})" if self.reason else ""
        return (
            f"neighbors: {self.method}{details}{why}, {shards}, memory: embeddings "
            f"{self.store_bytes / 2**20:.0f} MiB a node, search {self.actor_bytes / 2**20:.0f} MiB "
            "an actor"
        )


def plan_search(config: NeighborsConfig, num_views: int, dim: int) -> SearchPlan:
    """Return how the neighbours of `num_views` embeddings of `dim` channels are searched.

    Raises:
        ConfigError: if the method needs FAISS and it is not installed.
    """
    method, reason, lists = config.method, "", 0
    if method != "exact":
        import_faiss()
    if method in ("ivf-flat", "ivf-pq"):
        lists = num_lists(config.lists, num_views)
        wanted = POINTS_PER_LIST * (max(lists, CODES) if method == "ivf-pq" else lists)
        if num_views < wanted:
            reason = f"{method} of {lists} lists wants {wanted} views, there are {num_views}"
            method, lists = "exact", 0
    shard = min(num_views, config.shard_views)
    return SearchPlan(
        method=method,
        reason=reason,
        lists=lists,
        num_shards=-(-num_views // config.shard_views),
        store_bytes=num_views * dim * 4,
        actor_bytes=_index_bytes(method, shard, dim) + _working_bytes(config),
    )


def _index_bytes(method: SearchMethod, rows: int, dim: int) -> int:
    row_bytes = {
        "exact": 0,
        "flat": 4 * dim,
        "ivf-flat": 4 * dim + 8,
        "ivf-pq": code_bytes(dim) + 8,
    }
    return rows * row_bytes[method]


def _working_bytes(config: NeighborsConfig) -> int:
    candidates = max(2 * config.stored + 16, config.rerank * config.stored)
    return _TILES * config.tile_bytes + 2 * QUERY_BLOCK * candidates * _CANDIDATE_BYTES

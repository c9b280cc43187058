"""Settings of the neighbour search, and which of them determine its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from stego_core.config.base import NonNegative, Positive, Strict

SearchMethod = Literal["exact", "flat", "ivf-flat", "ivf-pq"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NeighborsConfig(Strict):
    """Mining of nearest neighbours."""

    stored: Positive = 30
    """Neighbours kept in the table for each view."""
    used: Positive = 7
    """A training pair draws uniformly from the nearest `used` (paper, section 4)."""
    exclude_own: bool = True
    """Other views of the same image are never neighbours. Without it they may be, as in the
    original code; the view itself still can't."""
    method: SearchMethod = "exact"
    """`exact`: matrix products; `flat`, `ivf-flat`, `ivf-pq`: FAISS (extra `cpu` or `gpu`), for
    millions of views. Too few views for an inverted file are searched exactly."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the exact search's first pass; speed only, the result is the same."""
    tile_bytes: Positive = 64 * 2**20
    """Largest score tile held by one search actor, in bytes."""
    shard_views: Positive = 2**20
    """Views of one gallery shard, which one actor searches at a time."""
    lists: NonNegative = 0
    """Lists of an inverted file; 0 takes four times the square root of the number of views."""
    probes: Positive = 32
    """Lists that a query is compared with; more cost time and miss fewer neighbours."""
    rerank: Positive = 4
    """FAISS candidates per neighbour kept; they are scored exactly before the best are taken."""


def search_settings(config: NeighborsConfig) -> dict[str, Any]:
    """Return the settings that determine the neighbours table; the others are speed and memory."""
    settings: dict[str, Any] = {"stored": config.stored, "exclude_own": config.exclude_own}
    if config.method == "exact":
        return settings
    settings |= {"method": config.method, "rerank": config.rerank, "shards": config.shard_views}
    if config.method != "flat":
        settings |= {"lists": config.lists, "probes": config.probes}
    return settings

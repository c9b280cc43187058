"""The stages of the neighbour search that run on workers: a shard's actor, merging, writing."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from stego_core.config.neighbors import NeighborsConfig
from stego_core.model.backbone import resolve_precision
from stego_core.neighbors.faiss_index import FaissIndex
from stego_core.neighbors.search import NONE, exact_top_k, merge_top_k, skip_first
from stego_core.neighbors.table import write_part
from stego_core.storage.feature_store import Views

Lists = tuple[np.ndarray, np.ndarray]  # scores (Q, k) float32 and views (Q, k) int64


class ShardSearcher:
    """The actor: a shard of the gallery, searched exactly or through a FAISS index.

    Args:
        embeddings: (G, D) float32, not copied: it lies in the object store.
        groups: (G,) int64.
        start: view of the first row.
        config: settings.
        device: of torch and FAISS.
        trained: what `train_index` returned, or None for the exact search.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        groups: np.ndarray,
        start: int,
        config: NeighborsConfig,
        *,
        device: str,
        trained: bytes | None,
    ) -> None:
        torch.set_num_threads(1)  # one CPU each
        self._device, self._config, self._start = device, config, start
        self._gallery, self._groups = self._tensor(embeddings), self._tensor(groups)
        self._precision = resolve_precision(config.precision, device)
        self._index = None
        if trained is not None:
            self._index = FaissIndex(
                trained,
                self._gallery,
                self._groups,
                probes=config.probes,
                rerank=config.rerank,
                device=device,
                tile_bytes=config.tile_bytes,
            )

    def top_k(
        self, embeddings: np.ndarray, groups: np.ndarray, rows: slice, *, is_exact: bool = False
    ) -> Lists:
        """Return the neighbours, in this shard, of some rows of another (or the same) shard."""
        queries, query_groups = self._tensor(embeddings[rows]), self._tensor(groups[rows])
        k = self._config.stored
        if self._index is not None and not is_exact:
            scores, found = self._index.top_k(queries, query_groups, k)
        else:
            scores, found = exact_top_k(
                queries,
                self._gallery,
                k,
                query_groups_Q=query_groups,
                gallery_groups_G=self._groups,
                tile_bytes=self._config.tile_bytes,
                precision="bf16" if self._precision == "bf16" else "fp32",
            )
        views = torch.where(found == NONE, NONE, found + self._start)
        return scores.cpu().numpy(), views.cpu().numpy()

    def _tensor(self, array: np.ndarray) -> Tensor:
        with warnings.catch_warnings():
            # The object store's memory is read-only, and nothing here writes to it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array).to(self._device)


def view_groups(views: Views, *, exclude_own: bool) -> np.ndarray:
    """Return the group of each view, (V,) int64: views of one group are never neighbours.

    A view is never its own neighbour; with `exclude_own` no view of its image is.
    """
    return views.image_ids if exclude_own else np.arange(len(views.image_ids))


def search_shard(
    query_embeddings: np.ndarray,
    query_groups: np.ndarray,
    rows: slice,
    embeddings: np.ndarray,
    groups: np.ndarray,
    *,
    start: int,
    config: NeighborsConfig,
    device: str,
    trained: bytes | None,
    is_exact: bool,
) -> Lists:
    """Return what a `ShardSearcher` of these settings finds for one block of queries."""
    trained = None if is_exact else trained
    shard = ShardSearcher(embeddings, groups, start, config, device=device, trained=trained)
    return shard.top_k(query_embeddings, query_groups, rows, is_exact=is_exact)


def _tensors(lists: Lists) -> tuple[Tensor, Tensor]:
    scores, views = lists
    return torch.tensor(scores), torch.tensor(views)


def merge(k: int, first: Lists, *others: Lists) -> Lists:
    """Return the best k of the lists of several shards."""
    best = _tensors(first)
    for other in others:
        best = merge_top_k(best, _tensors(other), k)
    return best[0].numpy(), best[1].numpy()


def write(
    found: Lists,
    views: Views,
    embeddings: np.ndarray | None,
    rows: slice,
    *,
    start: int,
    k: int,
    uri: str,
    key: str,
) -> None:
    """Write the neighbours of a block of queries.

    Args:
        found: their lists.
        views: all views; their vectors are not needed.
        embeddings: (G, D) of the shard that the queries are rows of, where the compat switch
            `skip_first_neighbor` asks for them.
        rows: the queries' rows of that shard.
        start: view of the shard's first row.
        k: neighbours kept.
        uri: target file.
        key: fingerprint of the embeddings.
    """
    scores, indices = found
    here = slice(start + rows.start, start + rows.stop)
    if embeddings is not None:
        queries, own = torch.tensor(embeddings[rows]), torch.arange(here.start, here.stop)
        best = skip_first(_tensors(found), queries, own, k)
        scores, indices = best[0].numpy(), best[1].numpy()
    write_part(uri, views, here, scores, indices, key=key)

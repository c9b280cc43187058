"""Candidates from FAISS indexes: flat, inverted file, inverted file with product quantisation.

FAISS only proposes; scores and order come from `stego_core.neighbors.scores`, as in the exact
search. Training sees a sample drawn by the seed, and everything runs on one thread per index, so
that the result depends on neither the number of workers nor that of CPUs.

Legend: Q queries, G gallery rows, D channels, S sampled rows, W candidates, k neighbours.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stego_core.config.neighbors import SearchMethod
from stego_core.errors import ConfigError
from stego_core.neighbors.scores import NONE, OwnGroups, best_candidates

logger = logging.getLogger(__name__)

POINTS_PER_LIST = 39  # below that FAISS itself warns of bad centroids
_SAMPLE_PER_LIST = 64  # rows that a list's centroid is trained on
CODES = 256  # of one sub-quantiser: 8 bits
_GPU_CANDIDATES = 2048  # FAISS on a GPU returns no more
_CHANNELS_PER_CODE = 8  # of product quantisation at least: 1/32 of the memory of float32
# The bytes of a quantised vector that FAISS takes on a GPU; the same are taken on a CPU, so that
# both find the same.
_GPU_CODES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)


def import_faiss() -> Any:
    """Return the module.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "neighbors.method other than exact needs FAISS: pip install 'stego-ray[cpu]', "
            "or 'stego-ray[gpu]' for CUDA 12, or set --neighbors.method exact"
        ) from error
    return faiss


def num_lists(lists: int, num_views: int) -> int:
    """Return the number of lists of an inverted file over `num_views` vectors."""
    return lists or max(1, round(4 * num_views**0.5))


def code_bytes(dim: int) -> int:
    """Return the bytes of a quantised vector: the most sub-vectors of at least eight channels."""
    most = max(1, dim // _CHANNELS_PER_CODE)
    return max(codes for codes in _GPU_CODES if codes <= most and dim % codes == 0)


def training_rows(method: SearchMethod, lists: int) -> int:
    """Return how many vectors training wants to see."""
    rows = 0 if method == "flat" else _SAMPLE_PER_LIST * lists
    return max(rows, _SAMPLE_PER_LIST * CODES) if method == "ivf-pq" else rows


def train_index(sample_SD: np.ndarray, method: SearchMethod, *, lists: int, seed: int) -> bytes:
    """Return a trained index that holds no vectors yet, as FAISS writes it.

    Args:
        sample_SD: float32 vectors of the gallery, unit length.
        method: which index.
        lists: of an inverted file.
        seed: of the k-means.

    Raises:
        ConfigError: if FAISS is not installed.
    """
    faiss = import_faiss()
    faiss.omp_set_num_threads(1)
    dim = sample_SD.shape[1]
    # np: no polysemous codes, which nothing here uses and which take most of the training's time.
    name = {"flat": "Flat", "ivf-flat": f"IVF{lists},Flat"}.get(
        method, f"IVF{lists},PQ{code_bytes(dim)}np"
    )
    index = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
    parameters = [index.cp] if method != "flat" else []
    parameters += [index.pq.cp] if method == "ivf-pq" else []
    for one in parameters:
        # The sample is drawn already: FAISS is to use all of it.
        one.seed, one.max_points_per_centroid = seed, len(sample_SD)
    if method != "flat":
        index.train(np.ascontiguousarray(sample_SD, np.float32))
    return bytes(faiss.serialize_index(index))


class FaissIndex:
    """A gallery in a FAISS index.

    Args:
        trained: what `train_index` returned.
        gallery_GD: float32, unit length; it is also kept for the exact scores.
        groups_G: int64 group of each row.
        probes: lists that a query is compared with.
        rerank: candidates per neighbour that are scored exactly.
        device: `cuda` puts the index on the GPU if this FAISS can.
        tile_bytes: about the memory of the candidates' rows that are held at a time.
    """

    def __init__(
        self,
        trained: bytes,
        gallery_GD: Tensor,
        groups_G: Tensor,
        *,
        probes: int,
        rerank: int,
        device: str = "cpu",
        tile_bytes: int = 64 * 2**20,
    ) -> None:
        faiss = import_faiss()
        faiss.omp_set_num_threads(1)
        index = faiss.deserialize_index(np.frombuffer(trained, np.uint8))
        if hasattr(index, "nprobe"):
            index.nprobe = min(probes, index.nlist)
        if device == "cuda" and hasattr(faiss, "StandardGpuResources"):
            # Kept here as well: the index on the GPU does not own it.
            self._resources = faiss.StandardGpuResources()
            options = faiss.GpuClonerOptions()
            # Tables of long codes don't fit a GPU's shared memory in float32. Of other indexes this
            # would round the vectors themselves.
            options.useFloat16 = hasattr(index, "pq")
            index = faiss.index_cpu_to_gpu(self._resources, 0, index, options)
        elif device == "cuda":
            logger.info("this FAISS has no GPU support (extra gpu): searching on the CPU")
        index.add(gallery_GD.cpu().numpy())
        self._index, self._gallery, self._groups = index, gallery_GD, groups_G
        self._rerank, self._tile_bytes = rerank, tile_bytes
        most = _GPU_CANDIDATES if hasattr(self, "_resources") else len(gallery_GD)
        self._most = min(most, len(gallery_GD))
        self._largest_group = OwnGroups(groups_G).largest

    def top_k(self, queries_QD: Tensor, query_groups_Q: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k best rows of the candidates, as `exact_top_k` returns the best of all."""
        width = min(k * self._rerank + self._largest_group, self._most)
        _, found = self._index.search(queries_QD.cpu().numpy(), width)
        candidates = torch.from_numpy(found).to(queries_QD.device)
        own = self._groups[candidates.clamp(min=0)] == query_groups_Q[:, None]
        candidates = candidates.masked_fill(own, NONE)
        return best_candidates(
            queries_QD, self._gallery, candidates, k, tile_bytes=self._tile_bytes
        )

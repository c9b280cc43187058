"""Clusters refined on every token of every view, the work shared by the workers of a training.

k-means finds clusters on a sample of tokens; a few of Lloyd's iterations over all of them then move
each cluster to the mean of all its tokens. A worker sums the tokens of its share of the views. The
sums are integers, so that their order, and with it the number of workers, changes nothing.

Letters in names: B views, T tokens, C feature channels, K code channels, M clusters, h w grid.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.config.schema import TrainJob
from stego_core.model.objectness import (
    Balance,
    Objectness,
    balance_background,
    find_objectness,
)
from stego_core.training.loop import TrainContext, TrainData
from stego_core.training.maps import pull_of, sample_maps
from stego_core.training.workers import from_first_worker, sum_over_workers

logger = logging.getLogger(__name__)

# Views of one pass through the head. The last bits of a code may depend on what it is computed
# with, so blocks are the same for any number of workers.
_BLOCK = 32
# A token's share of a sum is a multiple of 2^-20 and below 2^10: 2^33 tokens fit into 64 bits.
_UNITS = 2.0**20
_MOST_WEIGHT = 2.0**10


@torch.no_grad()
def refine_clusters(
    job: TrainJob,
    clusters_MK: Tensor,
    encode: Callable[[Tensor], Tensor],
    data: TrainData,
    context: TrainContext,
    *,
    device: str,
) -> Tensor:
    """Return clusters after `clusters.passes` iterations of spherical k-means over all tokens.

    Called by all workers. Tokens count as they did when the clusters were found; those of the
    background have the share of the weight that they have in the sample. A cluster that no token
    is nearest to stays where it is.

    Args:
        job: the configuration.
        clusters_MK: to start from; the same on all workers.
        encode: features (B, C, h, w) to smoothed codes (B, K, h, w), on the CPU.
        data: what was trained on.
        context: of this worker.
        device: of torch, where workers exchange sums.

    Returns:
        Unit rows, (M, K) float32 on the CPU: for the same head and start the same bits on all
        workers and for any number of them. Clusters that were merged keep what they merge to.
    """
    weigh = _weights(job, data)
    blocks = np.array_split(
        np.arange(len(data.neighbors)), np.arange(_BLOCK, len(data.neighbors), _BLOCK)
    )
    own = blocks[context.rank :: context.num_workers]
    clusters_MK = F.normalize(clusters_MK.cpu().float(), dim=1)
    for number in range(job.clusters.passes):
        data.features.expect(own)
        sums = torch.zeros(len(clusters_MK), clusters_MK.shape[1] + 2, dtype=torch.int64)
        for views in own:
            features = data.features.read(views)
            codes_TK = F.normalize(_tokens(encode(features)), dim=1)
            _add(sums, codes_TK, weigh(features), clusters_MK)
        sums = sum_over_workers(sums.to(device)).cpu()
        clusters_MK, cosine = _moved(clusters_MK, sums)
        context.event("clusters/pass", number=number + 1, mean_cosine=round(cosine, 6))
        if context.rank == 0:
            logger.info(
                "clusters: pass %d/%d over all tokens, mean cosine %.4f",
                number + 1,
                job.clusters.passes,
                cosine,
            )
    return clusters_MK


def _weights(job: TrainJob, data: TrainData) -> Callable[[Tensor], Tensor]:
    """Return what weighs tokens: features to (T,), as rank 0 finds it on the sample of `fit`."""
    objectness, balance = from_first_worker(lambda: _find_weights(job, data))
    return lambda features_BChw: balance(objectness(_tokens(features_BChw)))


def _find_weights(job: TrainJob, data: TrainData) -> tuple[Objectness, Balance]:
    def read(views: np.ndarray) -> tuple[Tensor, ...]:
        features = data.features.read(views)
        return features, pull_of(data, features, views)

    features_TC, pull_T1 = sample_maps(
        data.features, len(data.neighbors), job.clusters.sample, job.seed, read
    )
    objectness = find_objectness(features_TC, pull_T1[:, 0])
    return objectness, balance_background(objectness(features_TC), job.clusters.background)


def _tokens(maps_BChw: Tensor) -> Tensor:
    return maps_BChw.flatten(2).transpose(1, 2).flatten(0, 1)


def _add(sums: Tensor, codes_TK: Tensor, weights_T: Tensor, clusters_MK: Tensor) -> None:
    """Add tokens to the sums of their nearest clusters: codes, cosines, weights."""
    cosines_T, nearest_T = (codes_TK @ clusters_MK.T).max(1)
    # A code of length 0 has no direction and counts nowhere.
    weights_T = (weights_T * codes_TK.any(1)).clamp(max=_MOST_WEIGHT).double()
    rows = torch.cat([codes_TK, cosines_T[:, None], torch.ones_like(cosines_T)[:, None]], 1)
    units = (rows * weights_T[:, None] * _UNITS).round_().long()
    sums.index_add_(0, nearest_T, units)


def _moved(clusters_MK: Tensor, sums: Tensor) -> tuple[Tensor, float]:
    """Return the means of the clusters, unit rows, and the mean cosine before they moved."""
    means_MK, cosines_M, weights_M = sums[:, :-2].double(), sums[:, -2], sums[:, -1]
    means_MK = torch.where(means_MK.any(1, keepdim=True), means_MK, clusters_MK.double())
    cosine = float(cosines_M.sum()) / max(float(weights_M.sum()), 1.0)
    return F.normalize(means_MK, dim=1).float(), cosine

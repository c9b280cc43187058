"""The points that clusters are fitted to: projected codes, their weights, and their matches.

Letters in names: T tokens, C feature channels, K code channels, P pairs, M clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stego_core.config.schema import TrainJob
from stego_core.metrics.criterion import agreement
from stego_core.model.consistency import consistent_projection
from stego_core.model.objectness import balance_background, find_objectness
from stego_core.model.whitening import principal_scaling
from stego_core.training.loop import TrainData
from stego_core.training.maps import ModelMaps, sample_maps
from stego_core.training.matching import Matches, match_tokens


class Agreement:
    """How often matched tokens of neighbouring views are in the same cluster, beyond chance.

    Attributes:
        pairs: P, tokens that match.
    """

    def __init__(self, matches: Matches, projection_KK: Tensor) -> None:
        self.pairs = len(matches.first)
        self._first_PK = matches.first @ projection_KK.T
        self._second_PK = matches.second @ projection_KK.T

    def __call__(self, centroids_MK: Tensor) -> float:
        """Return Cohen's kappa between the clusters of both sides."""
        first, second = (
            (tokens @ centroids_MK.T).argmax(1).numpy()
            for tokens in (self._first_PK, self._second_PK)
        )
        return agreement(first, second)


@dataclass(frozen=True, slots=True)
class ClusterPoints:
    """A sample of the tokens of all views, as clusters see it.

    Attributes:
        features: (T, C), as the backbone gave them.
        points: (T, K) smoothed codes, less `mean`, projected.
        weights: (T,) how much each counts (docs/adr/0016).
        mean: (K,) of the codes.
        projection: (K, K) that makes directions comparable.
        agreement: of matched tokens; None where consistency is off.
    """

    features: Tensor
    points: Tensor
    weights: Tensor
    mean: Tensor
    projection: Tensor
    agreement: Agreement | None


def has_matches(job: TrainJob) -> bool:
    """Tell whether tokens of neighbouring views are matched."""
    return job.head.whiten > 0 and job.head.consistent


@torch.no_grad()
def cluster_points(job: TrainJob, maps: ModelMaps, data: TrainData, count: int) -> ClusterPoints:
    """Sample about `count` tokens of a model's maps.

    Args:
        job: the configuration.
        maps: of the model.
        data: what it is trained on.
        count: T, about.
    """
    features, pull, codes, smoothed = sample_maps(
        data.features, len(data.neighbors), count, job.seed, maps.read
    )
    matches = None
    if has_matches(job):
        matches = match_tokens(
            maps.smoothed, data.neighbors, seed=job.seed, expect=data.features.expect
        )
    mean, projection = _code_projection(codes, matches)
    objectness = find_objectness(features, pull[:, 0])(features)
    return ClusterPoints(
        features=features,
        points=(smoothed - mean) @ projection.T,
        weights=balance_background(objectness, job.clusters.background)(objectness),
        mean=mean,
        projection=projection,
        agreement=None if matches is None else Agreement(matches, projection),
    )


def _code_projection(codes_TK: Tensor, matches: Matches | None) -> tuple[Tensor, Tensor]:
    """Return mean (K,) and projection (K, K) of codes: consistency again, or whitening."""
    dim = codes_TK.shape[1]
    if matches is not None:
        projection = consistent_projection(matches.tokens, matches.differences)
        return torch.zeros(dim), projection
    mean, components = principal_scaling(codes_TK, dim)
    projection = torch.eye(dim)
    projection[: len(components)] = components  # fewer codes than channels: the rest stays
    return mean, projection

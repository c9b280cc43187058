"""What is fitted after the last step: clusters on codes, and the frozen-feature baseline."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from stego_core.config.schema import TrainJob
from stego_core.metrics.criterion import agreement
from stego_core.model.consistency import consistent_projection
from stego_core.model.head import Head
from stego_core.model.kmeans import spherical_kmeans
from stego_core.model.merging import merge_centroids
from stego_core.model.modularity import raise_modularity
from stego_core.model.objectness import balance_background, find_objectness
from stego_core.model.segmenter import BASELINE_LINEAR, LINEAR
from stego_core.model.whitening import principal_scaling
from stego_core.training.boost import boost_clusters
from stego_core.training.linear import fit_linear, labelled_points
from stego_core.training.loop import TrainData
from stego_core.training.maps import ModelMaps, sample_maps
from stego_core.training.matching import Matches, match_tokens
from stego_core.training.step import Trainable

logger = logging.getLogger(__name__)


@torch.no_grad()
def fit(job: TrainJob, model: Trainable, data: TrainData) -> dict[str, Tensor]:
    """Return the tensors of the model file.

    The cluster probe is refitted by spherical k-means on projected, smoothed codes, because the
    probe that SGD trains from random vectors loses clusters that it never finds again; no label is
    looked at. The projection is folded into the head's last layers. The baseline is k-means on the
    frozen features, all tokens alike: what the head has to beat. Labels, where there are some, give
    linear probes, which nothing else depends on.
    """
    maps = ModelMaps(job, model, data)
    features, pull, codes, smoothed = sample_maps(
        data.features, len(data.neighbors), job.clusters.sample, job.seed, maps.read
    )
    trained = model.final_head
    head = Head(trained.width, job.head)
    head.load_state_dict({key: value.cpu() for key, value in trained.state_dict().items()})
    clusters: dict[str, Tensor] = {"clusters": model.cluster_probe.clusters}
    mean, projection = torch.zeros(head.dim), torch.eye(head.dim)
    if job.clusters.refit != "none":
        matches = None
        if job.head.whiten and job.head.consistent:
            matches = match_tokens(
                maps.smoothed, data.neighbors, seed=job.seed, expect=data.features.expect
            )
        mean, projection = _code_projection(codes, matches)
        head.project_code(mean, projection)
        objectness = find_objectness(features, pull[:, 0])(features)
        weights = balance_background(objectness, job.clusters.background)(objectness)
        prefer = None if matches is None else _Agreement(matches, projection)
        clusters = _refit(job, (smoothed - mean) @ projection.T, weights, prefer)
    if job.clusters.boost == "primaps":
        clusters["clusters"] = boost_clusters(
            lambda views: maps.projected(views, mean, projection),
            clusters["clusters"],
            num_views=len(data.neighbors),
            seed=job.seed,
            expect=data.features.expect,
        )
    baseline = spherical_kmeans(
        features, job.clusters.total, seed=job.seed, restarts=job.clusters.restarts
    )
    tensors = {f"head.{key}": value for key, value in head.state_dict().items()}
    tensors |= clusters | {"baseline": baseline.centroids}
    if model.whitening is not None:
        tensors |= {f"whitening.{k}": v for k, v in model.whitening.state_dict().items()}
    tensors |= _linear_probe(job, model, data, maps, mean, projection)
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


class _Agreement:
    """How often matched tokens of neighbouring views are in the same cluster, beyond chance."""

    def __init__(self, matches: Matches, projection_KK: Tensor) -> None:
        self._first_PK = matches.first @ projection_KK.T
        self._second_PK = matches.second @ projection_KK.T

    def __call__(self, centroids_MK: Tensor) -> float:
        first, second = (
            (tokens @ centroids_MK.T).argmax(1).numpy()
            for tokens in (self._first_PK, self._second_PK)
        )
        return agreement(first, second)


def _refit(
    job: TrainJob, points_TK: Tensor, weights_T: Tensor, prefer: _Agreement | None
) -> dict[str, Tensor]:
    """Return `clusters` and, if more were fitted than asked for, how they `merge`."""
    is_modular = job.clusters.refit == "modularity"
    result = spherical_kmeans(
        points_TK,
        job.clusters.fitted,
        seed=job.seed,
        restarts=job.clusters.restarts,
        # Modularity starts from what k-means++ chose.
        max_iterations=0 if is_modular else 100,
        weights_N=weights_T,
        prefer=prefer,
    )
    logger.info(
        "clusters: mean cosine %.4f, %d times one without codes was moved",
        result.objective,
        result.revived,
    )
    clusters = result.centroids
    if is_modular:
        clusters = raise_modularity(points_TK, clusters, seed=job.seed)
    if job.clusters.over == 1:
        return {"clusters": clusters}
    return {"clusters": clusters, "merge": merge_centroids(clusters, job.clusters.total)}


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


def _linear_probe(
    job: TrainJob, model: Trainable, data: TrainData, maps: ModelMaps, mean_K: Tensor, to_KK: Tensor
) -> dict[str, Tensor]:
    """Return the linear probe for projected codes, and where it is fitted that for features."""
    if model.linear_probe is None:
        return {}
    if job.train.linear_refit and data.labels is not None:
        kinds, labels = labelled_points(
            maps.labelled,
            data.labels,
            len(data.neighbors),
            side=data.side,
            seed=job.seed,
            count=job.clusters.sample,
            expect=data.features.expect,
        )
        if len(labels):
            codes, details, features = kinds
            code = (codes - mean_K) @ to_KK.T
            probes = {LINEAR: torch.cat([code, details], 1), BASELINE_LINEAR: features}
            fitted = {
                name: fit_linear(points, labels, data.num_classes)
                for name, points in probes.items()
            }
            return {
                f"{name}.{part}": tensor
                for name, parts in fitted.items()
                for part, tensor in zip(("weight", "bias"), parts, strict=True)
            }
    # The probe that SGD trained, so that it gives the scores that it gave before.
    classifier = model.linear_probe.classifier
    assert classifier.bias is not None  # noqa: S101 - the probe is built with one
    weight = classifier.weight.flatten(1).cpu()
    return {
        "linear.weight": weight @ torch.linalg.pinv(to_KK),
        "linear.bias": classifier.bias.cpu() + weight @ mean_K,
    }

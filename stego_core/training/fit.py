"""What is fitted after the last step: clusters on codes, and the frozen-feature baseline."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from stego_core.config.schema import TrainJob
from stego_core.model.head import Head
from stego_core.model.kmeans import spherical_kmeans
from stego_core.model.merging import merge_centroids
from stego_core.model.modularity import raise_modularity
from stego_core.model.segmenter import BASELINE_LINEAR, LINEAR
from stego_core.training.boost import boost_clusters
from stego_core.training.linear import fit_linear, labelled_points
from stego_core.training.loop import TrainData
from stego_core.training.maps import ModelMaps, sample_tokens
from stego_core.training.points import ClusterPoints, cluster_points
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
    trained = model.final_head
    head = Head(trained.width, job.head)
    head.load_state_dict({key: value.cpu() for key, value in trained.state_dict().items()})
    clusters: dict[str, Tensor] = {"clusters": model.cluster_probe.clusters}
    mean, projection = torch.zeros(head.dim), torch.eye(head.dim)
    if job.clusters.refit == "none":
        features = sample_tokens(
            data.features, len(data.neighbors), job.clusters.sample, seed=job.seed
        )
    else:
        sample = cluster_points(job, maps, data, job.clusters.sample)
        features, mean, projection = sample.features, sample.mean, sample.projection
        head.project_code(mean, projection)
        clusters = _refit(job, sample)
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


def _refit(job: TrainJob, sample: ClusterPoints) -> dict[str, Tensor]:
    """Return `clusters` and, if more were fitted than asked for, how they `merge`."""
    is_modular = job.clusters.refit == "modularity"
    result = spherical_kmeans(
        sample.points,
        job.clusters.fitted,
        seed=job.seed,
        restarts=job.clusters.restarts,
        # Modularity starts from what k-means++ chose.
        max_iterations=0 if is_modular else 100,
        weights_N=sample.weights,
        prefer=sample.agreement,
    )
    logger.info(
        "clusters: mean cosine %.4f, %d times one without codes was moved",
        result.objective,
        result.revived,
    )
    clusters = result.centroids
    if is_modular:
        clusters = raise_modularity(sample.points, clusters, seed=job.seed)
    if job.clusters.over == 1:
        return {"clusters": clusters}
    return {"clusters": clusters, "merge": merge_centroids(clusters, job.clusters.total)}


def _linear_probe(
    job: TrainJob, model: Trainable, data: TrainData, maps: ModelMaps, mean_K: Tensor, to_KK: Tensor
) -> dict[str, Tensor]:
    """Return the linear probe for projected codes, and where it is fitted that for features."""
    if model.linear_probe is None:
        return {}
    if job.train.linear_refit:
        return _fitted_probes(job, data, maps, mean_K, to_KK)
    # The probe that SGD trained, so that it gives the scores that it gave before.
    classifier = model.linear_probe.classifier
    assert classifier.bias is not None  # noqa: S101 - the probe is built with one
    weight = classifier.weight.flatten(1).cpu()
    return {
        "linear.weight": weight @ torch.linalg.pinv(to_KK),
        "linear.bias": classifier.bias.cpu() + weight @ mean_K,
    }


def _fitted_probes(
    job: TrainJob, data: TrainData, maps: ModelMaps, mean_K: Tensor, to_KK: Tensor
) -> dict[str, Tensor]:
    """Return both probes at their optimum; nothing where no labelled pixel is found."""
    assert data.labels is not None  # noqa: S101 - there are classes
    kinds, labels = labelled_points(
        maps.labelled,
        data.labels,
        len(data.neighbors),
        side=data.side,
        seed=job.seed,
        count=job.clusters.sample,
        expect=data.features.expect,
    )
    if not len(labels):
        return {}
    codes, details, features = kinds
    code = (codes - mean_K) @ to_KK.T
    probes = {LINEAR: torch.cat([code, details], 1), BASELINE_LINEAR: features}
    return {
        f"{name}.{part}": tensor
        for name, points in probes.items()
        for part, tensor in zip(
            ("weight", "bias"), fit_linear(points, labels, data.num_classes), strict=True
        )
    }

"""What is fitted after the last step: clusters on codes, and the frozen-feature baseline."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stego_core.config.schema import TrainJob
from stego_core.model.head import Head
from stego_core.model.kmeans import spherical_kmeans
from stego_core.model.merging import merge_centroids
from stego_core.model.modularity import raise_modularity
from stego_core.model.smoothing import smooth_code
from stego_core.model.whitening import principal_scaling
from stego_core.training.loop import TrainData
from stego_core.training.step import Trainable
from stego_core.training.views import FeatureSource

logger = logging.getLogger(__name__)

_TOKENS_PER_VIEW = 32
_READ_VIEWS = 64


def sample_tokens(source: FeatureSource, num_views: int, count: int, *, seed: int) -> Tensor:
    """Return features at random cells of random views: (T, C) float32, T about `count`.

    The draw depends on the seed and the number of views and cells alone.
    """
    return _sample(source, num_views, count, seed, lambda maps: (maps,))[0]


def _sample(
    source: FeatureSource,
    num_views: int,
    count: int,
    seed: int,
    transform: Callable[[Tensor], tuple[Tensor, ...]],
) -> list[Tensor]:
    """Return what `transform` makes of the maps, each at the same random cells: (T, channels)."""
    generator = np.random.default_rng([seed, 2])
    cells = source.read(np.zeros(1, np.int64)).flatten(2).shape[2]
    chosen = min(num_views, -(-count // min(_TOKENS_PER_VIEW, cells)))
    views = np.sort(generator.choice(num_views, chosen, replace=False))
    per_view = min(-(-count // chosen), cells)
    parts = []
    for start in range(0, chosen, _READ_VIEWS):
        block = views[start : start + _READ_VIEWS]
        kinds = [maps.flatten(2).transpose(1, 2) for maps in transform(source.read(block))]
        picks = [np.sort(generator.choice(cells, per_view, replace=False)) for _ in block]
        rows = torch.arange(len(block))[:, None], torch.from_numpy(np.stack(picks))
        parts.append([kind[rows].flatten(0, 1) for kind in kinds])
    return [torch.cat(kind) for kind in zip(*parts, strict=True)]


@torch.no_grad()
def fit(job: TrainJob, model: Trainable, data: TrainData) -> dict[str, Tensor]:
    """Return the tensors of the model file.

    The cluster probe is refitted by spherical k-means on whitened, smoothed codes, because the
    probe that SGD trains from random vectors loses clusters that it never finds again; no label is
    looked at. The whitening is folded into the head's last layers, and into the linear probe, which
    gives the same scores as before. The baseline is the same k-means on the frozen features: what
    the head has to beat.
    """
    trained = model.final_head
    device = next(trained.parameters()).device

    def transform(features: Tensor) -> tuple[Tensor, ...]:
        seen = model.whiten(features.to(device))
        code = trained(seen)
        smooth = smooth_code(code, seen, temperature=job.head.smooth)
        return features, code.cpu(), smooth.cpu()

    num_views, restarts = len(data.neighbors), job.clusters.restarts
    features, codes, smoothed = _sample(
        data.features, num_views, job.clusters.sample, job.seed, transform
    )
    head = Head(trained.width, job.head)
    head.load_state_dict({key: value.cpu() for key, value in trained.state_dict().items()})
    clusters: Tensor = model.cluster_probe.clusters
    mean, projection = torch.zeros(head.dim), torch.eye(head.dim)
    merge: dict[str, Tensor] = {}
    if job.clusters.refit != "none":
        mean, components = principal_scaling(codes, head.dim)
        projection[: len(components)] = components  # fewer codes than channels: the rest stays
        head.project_code(mean, projection)
        points = (smoothed - mean) @ projection.T
        # Modularity starts from what k-means++ chose.
        iterations = 0 if job.clusters.refit == "modularity" else 100
        result = spherical_kmeans(
            points,
            job.clusters.fitted,
            seed=job.seed,
            restarts=restarts,
            max_iterations=iterations,
        )
        clusters = result.centroids
        logger.info("clusters: mean cosine %.4f", result.objective)
        if job.clusters.refit == "modularity":
            clusters = raise_modularity(points, clusters, seed=job.seed)
        if job.clusters.over > 1:
            merge["merge"] = merge_centroids(clusters, job.clusters.total)
    baseline = spherical_kmeans(features, job.clusters.total, seed=job.seed, restarts=restarts)
    tensors = {f"head.{key}": value for key, value in head.state_dict().items()}
    tensors |= {"clusters": clusters, "baseline": baseline.centroids} | merge
    if model.whitening is not None:
        tensors |= {f"whitening.{k}": v for k, v in model.whitening.state_dict().items()}
    if model.linear_probe is not None:
        classifier = model.linear_probe.classifier
        assert classifier.bias is not None  # noqa: S101 - the probe is built with one
        weight = classifier.weight.flatten(1).cpu()
        tensors["linear.weight"] = weight @ torch.linalg.pinv(projection)
        tensors["linear.bias"] = classifier.bias.cpu() + weight @ mean
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}

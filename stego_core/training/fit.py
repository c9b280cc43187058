"""What is fitted after the last step: clusters on codes, and the frozen-feature baseline."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from stego_core.config.schema import TrainJob
from stego_core.model.kmeans import spherical_kmeans
from stego_core.training.loop import TrainData
from stego_core.training.step import Trainable

logger = logging.getLogger(__name__)

_TOKENS_PER_VIEW = 32
_READ_VIEWS = 64


def sample_tokens(data: TrainData, *, count: int, seed: int) -> Tensor:
    """Return features at random grid positions of random views: (T, C) float32, T about `count`.

    The draw depends on the seed and the views alone.
    """
    generator = np.random.default_rng([seed, 2])
    num_views = len(data.neighbors)
    cells = data.features.read(np.zeros(1, np.int64)).flatten(2).shape[2]
    chosen = min(num_views, -(-count // min(_TOKENS_PER_VIEW, cells)))
    views = np.sort(generator.choice(num_views, chosen, replace=False))
    per_view = -(-count // chosen)
    tokens = []
    for start in range(0, chosen, _READ_VIEWS):
        maps = data.features.read(views[start : start + _READ_VIEWS]).flatten(2)
        for features in maps:
            picks = generator.choice(cells, min(per_view, cells), replace=False)
            tokens.append(features[:, torch.from_numpy(np.sort(picks))].T)
    return torch.cat(tokens)


def fit(job: TrainJob, model: Trainable, data: TrainData) -> dict[str, Tensor]:
    """Return the tensors of the model file.

    The cluster probe is refitted by spherical k-means on codes, because the probe that SGD trains
    from random vectors loses clusters that it never finds again; no label is looked at. The
    baseline is the same k-means on the frozen features: what the head has to beat.
    """
    features = sample_tokens(data, count=job.clusters.sample, seed=job.seed)
    with torch.no_grad():
        codes = torch.cat([_code(model, part) for part in torch.split(features, 8192)])
    clusters = model.cluster_probe.clusters.detach()
    if job.clusters.refit == "kmeans":
        result = spherical_kmeans(
            codes, job.clusters.count, seed=job.seed, restarts=job.clusters.restarts
        )
        clusters = result.centroids
        logger.info("clusters: mean cosine %.4f", result.objective)
    baseline = spherical_kmeans(
        features, job.clusters.count, seed=job.seed, restarts=job.clusters.restarts
    )
    tensors = {f"head.{key}": value for key, value in model.head.state_dict().items()}
    tensors |= {"clusters": clusters, "baseline": baseline.centroids}
    if model.linear_probe is not None:
        classifier = model.linear_probe.classifier
        assert classifier.bias is not None  # noqa: S101 - the probe is built with one
        tensors |= {"linear.weight": classifier.weight.flatten(1), "linear.bias": classifier.bias}
    return {key: value.detach().cpu() for key, value in tensors.items()}


def _code(model: Trainable, features_TC: Tensor) -> Tensor:
    """Return the code of single tokens, (T, K): the head's convolutions are 1x1."""
    device = next(model.head.parameters()).device
    code: Tensor = model.head(features_TC.T[None, :, None, :].to(device))
    return code[0, :, 0].T.cpu()

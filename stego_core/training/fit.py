"""What is fitted after the last step: clusters on codes, and the frozen-feature baseline."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.config.schema import TrainJob
from stego_core.metrics.criterion import agreement
from stego_core.model.consistency import consistent_projection
from stego_core.model.head import Head
from stego_core.model.kmeans import spherical_kmeans
from stego_core.model.merging import merge_centroids
from stego_core.model.modularity import raise_modularity
from stego_core.model.objectness import background_weights, measure_objectness
from stego_core.model.segmenter import BASELINE_LINEAR, LINEAR
from stego_core.model.smoothing import smooth_code
from stego_core.model.whitening import principal_scaling
from stego_core.training.boost import ViewMaps, boost_clusters
from stego_core.training.linear import fit_linear, labelled_points
from stego_core.training.loop import TrainData
from stego_core.training.matching import Matches, match_tokens
from stego_core.training.step import Trainable
from stego_core.training.views import FeatureSource

logger = logging.getLogger(__name__)

TOKENS_PER_VIEW = 32
_READ_VIEWS = 64


def sample_tokens(source: FeatureSource, num_views: int, count: int, *, seed: int) -> Tensor:
    """Return features at random cells of random views: (T, C) float32, T about `count`.

    The draw depends on the seed and the number of views and cells alone.
    """
    return _sample(source, num_views, count, seed, lambda views: (source.read(views),))[0]


def _sample(
    source: FeatureSource,
    num_views: int,
    count: int,
    seed: int,
    read: Callable[[np.ndarray], tuple[Tensor, ...]],
) -> list[Tensor]:
    """Return what `read` gives for views, each map at the same random cells: (T, channels).

    `source` is what `read` reads.
    """
    generator = np.random.default_rng([seed, 2])
    cells = read(np.zeros(1, np.int64))[0].flatten(2).shape[2]
    chosen = min(num_views, -(-count // min(TOKENS_PER_VIEW, cells)))
    views = np.sort(generator.choice(num_views, chosen, replace=False))
    per_view = min(-(-count // chosen), cells)
    parts = []
    blocks = [views[start : start + _READ_VIEWS] for start in range(0, chosen, _READ_VIEWS)]
    source.expect(blocks)
    for block in blocks:
        kinds = [maps.flatten(2).transpose(1, 2) for maps in read(block)]
        picks = [np.sort(generator.choice(cells, per_view, replace=False)) for _ in block]
        rows = torch.arange(len(block))[:, None], torch.from_numpy(np.stack(picks))
        parts.append([kind[rows].flatten(0, 1) for kind in kinds])
    return [torch.cat(kind) for kind in zip(*parts, strict=True)]


class _Maps:
    """The maps that are fitted on, for any views.

    Args:
        job: the configuration.
        model: after the last step.
        data: what it was trained on.
    """

    def __init__(self, job: TrainJob, model: Trainable, data: TrainData) -> None:
        self._job, self._model, self._data = job, model, data
        self._head = model.final_head
        self._device = next(self._head.parameters()).device

    def read(self, views: np.ndarray) -> tuple[Tensor, ...]:
        """Return features, pull of objectness (B, 1, h, w), codes and smoothed codes."""
        features = self._data.features.read(views)
        seen = self._model.whiten(features.to(self._device))
        code = self._head(seen)
        smooth = smooth_code(code, seen, temperature=self._job.head.smooth)
        return features, self._pull(features, views), code.cpu(), smooth.cpu()

    def smoothed(self, views: np.ndarray) -> Tensor:
        """Return smoothed codes (B, K, h, w)."""
        return self.read(views)[3]

    def labelled(self, views: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return smoothed codes, details and features: what linear probes are fitted on."""
        features, _, _, smooth = self.read(views)
        whitening = self._model.whitening
        if whitening is None:
            return smooth, features[:, :0], features
        return smooth, whitening.details(features.to(self._device)).cpu(), features

    def projected(self, views: np.ndarray, mean_K: Tensor, projection_KK: Tensor) -> ViewMaps:
        """Return what the boost needs, with smoothed codes projected."""
        features, _, _, smooth = self.read(views)
        seen = self._model.whiten(features.to(self._device))
        centred = smooth - mean_K.view(1, -1, 1, 1)
        return ViewMaps(seen, torch.einsum("ij,bjhw->bihw", projection_KK, centred))

    def _pull(self, features_BChw: Tensor, views: np.ndarray) -> Tensor:
        """Return what tends to be higher on things: likeness to the class token, or the centre."""
        if self._data.class_tokens is not None:
            tokens = torch.from_numpy(self._data.class_tokens[views])[:, :, None, None]
            return F.cosine_similarity(features_BChw, tokens, dim=1)[:, None]
        h, w = features_BChw.shape[2:]
        down, across = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)[None]
        return -(down**2 + across**2).expand(len(features_BChw), 1, h, w)


@torch.no_grad()
def fit(job: TrainJob, model: Trainable, data: TrainData) -> dict[str, Tensor]:
    """Return the tensors of the model file.

    The cluster probe is refitted by spherical k-means on projected, smoothed codes, because the
    probe that SGD trains from random vectors loses clusters that it never finds again; no label is
    looked at. The projection is folded into the head's last layers. The baseline is k-means on the
    frozen features, all tokens alike: what the head has to beat. Labels, where there are some, give
    linear probes, which nothing else depends on.
    """
    maps = _Maps(job, model, data)
    features, pull, codes, smoothed = _sample(
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
        objectness = measure_objectness(features, pull[:, 0])
        weights = background_weights(objectness, job.clusters.background)
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
    logger.info("clusters: mean cosine %.4f", result.objective)
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
    job: TrainJob, model: Trainable, data: TrainData, maps: _Maps, mean_K: Tensor, to_KK: Tensor
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

"""Maps of a trained model, for any views, and samples of their tokens: what is fitted on.

Letters in names: T tokens, B views, C feature channels, K code channels, h w grid.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.config.schema import TrainJob
from stego_core.model.smoothing import smooth_code
from stego_core.training.boost import ViewMaps
from stego_core.training.loop import TrainData
from stego_core.training.step import Trainable
from stego_core.training.views import FeatureSource

TOKENS_PER_VIEW = 32
_READ_VIEWS = 64


def sample_tokens(source: FeatureSource, num_views: int, count: int, *, seed: int) -> Tensor:
    """Return features at random cells of random views: (T, C) float32, T about `count`.

    The draw depends on the seed and the number of views and cells alone.
    """
    return sample_maps(source, num_views, count, seed, lambda views: (source.read(views),))[0]


def sample_maps(
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


class ModelMaps:
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
        return features, pull_of(self._data, features, views), code.cpu(), smooth.cpu()

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


def pull_of(data: TrainData, features_BChw: Tensor, views: np.ndarray) -> Tensor:
    """Return what tends to be higher on things, (B, 1, h, w).

    It is the likeness to the class token, or how near the centre is where there is none.
    """
    if data.class_tokens is not None:
        tokens = torch.from_numpy(data.class_tokens[views])[:, :, None, None]
        return F.cosine_similarity(features_BChw, tokens, dim=1)[:, None]
    h, w = features_BChw.shape[2:]
    down, across = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)[None]
    return -(down**2 + across**2).expand(len(features_BChw), 1, h, w)

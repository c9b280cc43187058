"""Judging a trained head on stored features: without labels by criteria, with labels by pixels.

The backbone is not run: features are stored once and serve every head of a study.

Legend: B images, C feature channels, K code channels, N clusters, h w grid, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stego_core.inference.predict import upsampled_argmax
from stego_core.metrics.confusion import confusion_matrix
from stego_core.metrics.criterion import agreement, margin, mutual_nearest, stability
from stego_core.model.segmenter import CLUSTER, Segmenter

MAX_CLASSES = 255
_VIEWS = 128  # views that criteria look at: enough for two digits
_TOKENS = 64  # tokens of each view that k-means of the two halves sees
_BATCH = 16
_STREAM = 8


class _Features(nn.Module):
    """Stands where the backbone does and passes features on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def prepare(self, features: Tensor) -> Tensor:
        """Return the features as they are."""
        return features

    def forward(self, features: Tensor) -> Tensor:
        return features


def head_on_features(tensors: dict[str, Tensor], card: dict[str, Any], width: int) -> Segmenter:
    """Return a model whose `encode` takes features (B, C, h, w) instead of pixels.

    Args:
        tensors: as `model.safetensors` has them.
        card: as `model.json`.
        width: C.

    Raises:
        CheckpointError: if the tensors don't fit each other.
    """
    passing: Any = _Features(width)
    return Segmenter(passing, tensors, card)


@torch.no_grad()
def measure_criteria(
    model: Segmenter,
    read: Callable[[np.ndarray], Tensor],
    nearest_V: np.ndarray,
    *,
    seed: int = 0,
    expect: Callable[[Sequence[np.ndarray]], None] | None = None,
) -> dict[str, float]:
    """Return every criterion of a model on a sample of views; no label is looked at.

    - `agreement`: Cohen's kappa of the clusters of tokens with those of their counterparts in the
      view's nearest neighbour, where both are each other's nearest by the frozen features;
    - `stability`: see `metrics.criterion.stability`, on codes;
    - `margin`: see `metrics.criterion.margin`.

    Args:
        model: of `head_on_features`.
        read: views (B,) → features (B, C, h, w).
        nearest_V: nearest neighbour of each view, negative where there is none.
        seed: of the sample; the same for all trials that are compared.
        expect: told beforehand what `read` will be called with.
    """
    generator = np.random.default_rng([seed, _STREAM])
    count = min(_VIEWS, len(nearest_V))
    views = generator.choice(len(nearest_V), count, replace=False)
    own_labels: list[np.ndarray] = []
    other_labels: list[np.ndarray] = []
    codes: list[Tensor] = []
    margins: list[float] = []
    blocks = [views[start : start + _BATCH] for start in range(0, count, _BATCH)]
    pairs = [(block, np.where(nearest_V[block] < 0, block, nearest_V[block])) for block in blocks]
    if expect is not None:
        expect([views for pair in pairs for views in pair])
    for block, others in pairs:
        features, code, products = _tokens(model, read(block))
        other_features, _, other_products = _tokens(model, read(others))
        for row, (view, other) in enumerate(zip(block, others, strict=True)):
            margins.append(margin(products[row], code[row]))
            picked = generator.choice(code.shape[1], min(_TOKENS, code.shape[1]), replace=False)
            codes.append(code[row, np.sort(picked)])
            if view != other:
                here, there = mutual_nearest(features[row], other_features[row])
                own_labels.append(products[row].argmax(1)[here].numpy())
                other_labels.append(other_products[row].argmax(1)[there].numpy())
    empty = [np.empty(0, np.int64)]
    half = len(codes) // 2
    halves = (torch.cat(codes[:half] or codes), torch.cat(codes[half:]))
    return {
        "agreement": agreement(
            np.concatenate(empty + own_labels), np.concatenate(empty + other_labels)
        ),
        "stability": stability(halves, model.num_clusters, seed=seed),
        "margin": float(np.mean(margins)),
    }


def _tokens(model: Segmenter, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit features (B, T, C), codes (B, T, K) and products (B, T, N)."""
    features, code = model.encode(maps)
    products = model.products(code, CLUSTER)
    flat = [part.flatten(2).transpose(1, 2) for part in (features, code, products)]
    return F.normalize(flat[0], dim=2), flat[1], flat[2]


def count_pixels(model: Segmenter, features_Chw: Tensor, labels_HW: np.ndarray) -> np.ndarray:
    """Count an image's pixels by label and predicted cluster, at the labels' size.

    Args:
        model: of `head_on_features`.
        features_Chw: of the whole image.
        labels_HW: class ids.

    Returns:
        Counts (255, N) int64, oriented [true, pred].
    """
    _, code = model.encode(features_Chw[None].float())
    predicted = upsampled_argmax(model.products(code, CLUSTER)[0], *labels_HW.shape)
    return confusion_matrix(
        labels_HW, predicted, num_classes=MAX_CLASSES, num_clusters=model.num_clusters
    )

"""The linear probe, fitted to its optimum after training: what labels could read from the model.

SGD beside the head ends far from the optimum after a few hundred steps, and then says more about
the number of steps than about the code. Logistic regression is convex: this has one answer, and
the same fit on the frozen features tells what the head lost.

Letters in names: P labelled points, C channels, N classes, h w grid.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.training.views import IGNORE_INDEX, LabelSource, Reads

_POINTS = 64  # labelled pixels of a view: neighbours in an image say the same
_READ_VIEWS = 32
_PENALTY = 1e-3  # of squared weights of scaled points, beside the mean cross-entropy
_ITERATIONS = 200
_STREAM = 10


def labelled_points(
    read: Callable[[np.ndarray], tuple[Tensor, ...]],
    labels: LabelSource,
    num_views: int,
    *,
    side: int,
    seed: int,
    count: int,
    expect: Callable[[Reads], None] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Return maps at random labelled pixels of random views, read bilinearly.

    Args:
        read: views (B,) → maps (B, C, h, w), any number of kinds.
        labels: of the views.
        num_views: that there are.
        side: pixels along a view.
        seed: of the draw; the same pixels are drawn for the same seed.
        count: pixels to draw; those without a label don't count.
        expect: told beforehand what `read` will be called with (see `FeatureSource`).

    Returns:
        Each kind at the pixels, (P, C) float32, and their labels, (P,) int64.
    """
    generator = np.random.default_rng([seed, _STREAM])
    chosen = min(num_views, -(-count // _POINTS))
    views = np.sort(generator.choice(num_views, chosen, replace=False))
    per_view = -(-count // chosen)
    drawn = []
    for start in range(0, chosen, _READ_VIEWS):
        block = views[start : start + _READ_VIEWS]
        pixels = torch.from_numpy(generator.random((len(block), per_view, 2)))
        values, coords = labels.read(block, pixels, side)
        is_labelled = (values >= 0) & (values < IGNORE_INDEX)
        if is_labelled.any():
            drawn.append((block, values[is_labelled], coords, is_labelled))
    if expect is not None:
        expect([block for block, *_ in drawn])
    kinds = [
        [_at(maps.float().cpu(), coords)[is_labelled] for maps in read(block)]
        for block, _, coords, is_labelled in drawn
    ]
    found = [values for _, values, *_ in drawn]
    if not found:
        return [], torch.empty(0, dtype=torch.int64)
    return [torch.cat(kind) for kind in zip(*kinds, strict=True)], torch.cat(found)


def _at(maps_BChw: Tensor, coords_BP2: Tensor) -> Tensor:
    """Return maps at points, (B, P, C), as logits are read when they are resized to the labels."""
    sampled = F.grid_sample(
        maps_BChw, coords_BP2[:, None].float(), padding_mode="border", align_corners=False
    )
    return sampled[:, :, 0].transpose(1, 2)


def fit_linear(points_PC: Tensor, labels_P: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return weight (N, C) and bias (N,) of a multinomial logistic regression.

    Points are centred and scaled for the fit, all channels alike: those that vary little then cost
    much to use, which is what keeps a probe on many channels from fitting noise. The scale is
    folded into the weights. A class without a pixel gets a bias so low that it is never predicted.

    Args:
        points_PC: what to classify, P at least 1.
        labels_P: classes in [0, N).
        num_classes: N.
    """
    mean = points_PC.mean(0)
    scale = (points_PC - mean).square().mean().sqrt().clamp_min(1e-6)
    standard = (points_PC - mean) / scale
    present = torch.unique(labels_P)
    targets = torch.searchsorted(present, labels_P)
    weight = torch.zeros(len(present), points_PC.shape[1], requires_grad=True)
    bias = torch.zeros(len(present), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(standard @ weight.T + bias, targets)
        loss = loss + _PENALTY * weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    scaled = weight.detach() / scale
    whole_weight = torch.zeros(num_classes, points_PC.shape[1])
    whole_bias = torch.full((num_classes,), -1e4)
    whole_weight[present] = scaled
    whole_bias[present] = bias.detach() - scaled @ mean
    return whole_weight, whole_bias

"""Shifts from the data: what "similar" means for this backbone and these images.

The paper's shifts were tuned by hand, for DINO. Correspondences of other backbones lie elsewhere
(DINOv2: 0.66 self, 0.63 knn, 0.47 random on street scenes), where those numbers attract nearly all
pairs of an image and of neighbours. Here one number serves all kinds of pairs: the correspondence
that three in a hundred random pairs of points exceed, measured on the views before the first step.
That share was chosen for whitened features; the shifts of plain ones follow the batch
(`stego_core.loss.shifts`). No label is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stego_core.loss.correspondence import correspondence, derangement
from stego_core.neighbors.search import NONE
from stego_core.training.views import FeatureSource

KINDS = ("self", "knn", "random")
# Share of the random pairs of points that attract each other (ADR 0009 has the trials).
ATTRACTED = 0.03
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
VIEWS = 96
_GRID = 8  # points along each axis: as many pairs as matter for a quantile, at little cost


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured and what follows from it.

    Attributes:
        shifts: b of each kind of pair.
        means: mean correspondence of each kind.
        quantiles: `QUANTILES` of the correspondences of each kind.
        attracted: share of the pairs of each kind that are above its shift, [0, 1].
    """

    shifts: dict[str, float]
    means: dict[str, float]
    quantiles: dict[str, list[float]]
    attracted: dict[str, float]


def calibrate(
    features: FeatureSource,
    neighbors_VN: np.ndarray,
    *,
    seed: int,
    shifts: dict[str, float] | None = None,
) -> Calibration:
    """Measure the correspondences of the views and choose the shifts.

    Args:
        features: of the views, as teacher and head see them.
        neighbors_VN: (V, N) views, `NONE` where there are fewer.
        seed: of the sample.
        shifts: of each kind, where they are given; they are measured, not chosen.
    """
    generator = np.random.default_rng([seed, 3])
    count = min(VIEWS, len(neighbors_VN))
    anchors = np.sort(generator.choice(len(neighbors_VN), count, replace=False))
    nearest = np.where(neighbors_VN[anchors, 0] == NONE, anchors, neighbors_VN[anchors, 0])
    features.expect([anchors, nearest])
    own, near = _thin(features.read(anchors)), _thin(features.read(nearest))
    partners = derangement(count, torch.Generator().manual_seed(seed))
    ordered = {
        kind: np.sort(correspondence(own, other).numpy().ravel())
        for kind, other in zip(KINDS, (own, near, own[partners]), strict=True)
    }
    if shifts is None:
        shifts = dict.fromkeys(KINDS, round(_quantile(ordered["random"], 1 - ATTRACTED), 4))
    return Calibration(
        shifts=shifts,
        means={kind: round(float(values.mean()), 4) for kind, values in ordered.items()},
        quantiles={
            kind: [round(_quantile(values, share), 4) for share in QUANTILES]
            for kind, values in ordered.items()
        },
        attracted={
            kind: round(float((values > shifts[kind]).mean()), 4)
            for kind, values in ordered.items()
        },
    )


def _thin(maps_BChw: Tensor) -> Tensor:
    h, w = maps_BChw.shape[2:]
    rows = torch.linspace(0, h - 1, min(h, _GRID)).long()
    columns = torch.linspace(0, w - 1, min(w, _GRID)).long()
    return maps_BChw[:, :, rows][:, :, :, columns]


def _quantile(ordered: np.ndarray, share: float) -> float:
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])

"""Shifts from the data: what "similar" means for this backbone and these images.

The paper's shifts were tuned by hand, for DINO. Correspondences of other backbones lie elsewhere
(DINOv2: 0.66 self, 0.63 knn, 0.47 random on street scenes), where those numbers attract
everything and the code collapses. Here a shift is a quantile of the correspondences as the loss
sees them, measured on the views themselves before the first step; no label is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stego_core.loss.correspondence import centre, correspondence, derangement
from stego_core.neighbors.search import NONE
from stego_core.training.views import FeatureSource

KINDS = ("self", "knn", "random")
# Share of the pairs of points that repel each other, by kind of pair.
REPELLED = {"self": 0.5, "knn": 0.5, "random": 0.9}
_VIEWS = 96
_GRID = 8  # points along each axis: as many pairs as matter for a quantile, at little cost


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured and what follows from it.

    Attributes:
        shifts: b of each kind of pair.
        means: mean correspondence of each kind.
        quantiles: 5, 25, 50, 75 and 95 % of the centred correspondences of each kind.
    """

    shifts: dict[str, float]
    means: dict[str, float]
    quantiles: dict[str, list[float]]


def calibrate(
    features: FeatureSource,
    neighbors_VN: np.ndarray,
    *,
    seed: int,
    repelled: dict[str, float] | None = None,
) -> Calibration:
    """Measure the correspondences of the views and choose the shifts.

    Args:
        features: of the views.
        neighbors_VN: (V, N) views, `NONE` where there are fewer.
        seed: of the sample.
        repelled: share of the pairs of points of each kind that lie below the shift.
    """
    shares = REPELLED if repelled is None else repelled
    generator = np.random.default_rng([seed, 3])
    count = min(_VIEWS, len(neighbors_VN))
    anchors = np.sort(generator.choice(len(neighbors_VN), count, replace=False))
    nearest = np.where(neighbors_VN[anchors, 0] == NONE, anchors, neighbors_VN[anchors, 0])
    own, near = _thin(features.read(anchors)), _thin(features.read(nearest))
    partners = derangement(count, torch.Generator().manual_seed(seed))
    shifts, means, quantiles = {}, {}, {}
    for kind, other in (("self", own), ("knn", near), ("random", own[partners])):
        values = correspondence(own, other)
        means[kind] = float(values.mean())
        ordered = np.sort(centre(values).numpy().ravel())
        shifts[kind] = _quantile(ordered, shares[kind])
        quantiles[kind] = [round(_quantile(ordered, q), 4) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
    return Calibration(
        shifts={kind: round(value, 4) for kind, value in shifts.items()},
        means={kind: round(value, 4) for kind, value in means.items()},
        quantiles=quantiles,
    )


def _thin(maps_BChw: Tensor) -> Tensor:
    h, w = maps_BChw.shape[2:]
    rows = torch.linspace(0, h - 1, min(h, _GRID)).long()
    columns = torch.linspace(0, w - 1, min(w, _GRID)).long()
    return maps_BChw[:, :, rows][:, :, :, columns]


def _quantile(ordered: np.ndarray, share: float) -> float:
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])

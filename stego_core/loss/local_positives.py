"""Local hidden positives: a cell's like neighbours are positives too, so the loss sees their mix.

Letters in names: B images, C feature channels, K code channels, h w grid, P = 9 places of a 3x3
neighbourhood.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.errors import ShapeError
from stego_core.loss.cosine import unit_cells

_SIDE = 3


def mix_neighbors(code_BKhw: Tensor, features_BChw: Tensor) -> Tensor:
    """Mix each code with those of its 3x3 neighbourhood whose features are like its own.

    A neighbour's weight is the cosine of its features with the cell's, 0 where that is below the
    mean cosine of the neighbourhood (the cell itself included) or negative; the weights of a cell
    sum to 1. Cells beyond the edge of the grid don't count.

    Args:
        code_BKhw: codes, (B, K, h, w); the result is linear in them.
        features_BChw: features of the same grid, (B, C, h, w); they get no gradient.

    Returns:
        Mixed codes, (B, K, h, w).

    Raises:
        ShapeError: if the two disagree in B or grid.
    Source: local hidden positives of Seong et al., "Leveraging Hidden Positives for Unsupervised
        Semantic Segmentation", CVPR 2023. They weight by the last block's attention, which the
        feature store doesn't hold; the cosine of the features stands in for it.
    """
    if code_BKhw.shape[2:] != features_BChw.shape[2:] or len(code_BKhw) != len(features_BChw):
        raise ShapeError(
            f"code {tuple(code_BKhw.shape)} and features {tuple(features_BChw.shape)}: give maps "
            "of one grid"
        )
    with torch.no_grad():
        weights = _weights(features_BChw).to(code_BKhw.dtype)
    return (_neighborhoods(code_BKhw) * weights[:, None]).sum(2)


def _weights(features_BChw: Tensor) -> Tensor:
    """Return (B, P, h, w), sums of 1 over P."""
    unit = unit_cells(features_BChw)
    cosines = (_neighborhoods(unit) * unit[:, :, None]).sum(1)
    inside = _neighborhoods(unit.new_ones(1, 1, *unit.shape[2:]))[:, 0]
    mean = (cosines * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True)
    # The cell's own cosine is the largest; rounding must not put it below a mean of equals.
    kept = (cosines >= mean - 1e-6) & (inside > 0)
    weights = torch.where(kept, cosines.clamp(min=0), 0)
    total = weights.sum(1, keepdim=True)
    own = F.one_hot(torch.tensor(_SIDE**2 // 2), _SIDE**2).to(weights).view(1, -1, 1, 1)
    # A cell without features has no cosines: it keeps its own code.
    return torch.where(total > 0, weights / total.clamp_min(1e-12), own)


def _neighborhoods(maps_BChw: Tensor) -> Tensor:
    """Return (B, C, P, h, w): the maps moved to each place of the neighbourhood, 0 outside."""
    batch, channels, h, w = maps_BChw.shape
    columns = F.unfold(maps_BChw, _SIDE, padding=_SIDE // 2)
    return columns.view(batch, channels, _SIDE**2, h, w)

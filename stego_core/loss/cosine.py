"""Cosines of two maps, cell by cell.

Letters in names: B images, C channels, h w grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.errors import ShapeError

# Below this length a vector counts as zero: it keeps a cosine of 0 with everything.
_SMALLEST_NORM = 1e-10


def cell_cosines(a_BChw: Tensor, b_BChw: Tensor) -> Tensor:
    """Compute the cosine of two maps at each cell.

    Args:
        a_BChw: first maps, (B, C, h, w); need not be normalised.
        b_BChw: second maps, the same shape.

    Returns:
        Cosines in [-1, 1], (B, h, w), float32 or wider.

    Raises:
        ShapeError: if the shapes aren't four-dimensional and equal.
    """
    if a_BChw.ndim != 4 or a_BChw.shape != b_BChw.shape:
        raise ShapeError(
            f"maps {tuple(a_BChw.shape)} and {tuple(b_BChw.shape)}: give (B, C, h, w) twice"
        )
    return (unit_cells(a_BChw) * unit_cells(b_BChw)).sum(1)


def unit_cells(maps_BChw: Tensor) -> Tensor:
    """Return the maps with vectors of length 1 at each cell, float32 or wider."""
    wide = maps_BChw.to(torch.promote_types(maps_BChw.dtype, torch.float32))
    return F.normalize(wide, dim=1, eps=_SMALLEST_NORM)

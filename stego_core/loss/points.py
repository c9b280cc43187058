"""Sampling maps at points, fast: the corners of each point are found once and used for every map.

`sample_rows` equals `correspondence.sample_points`, which says what is computed; this says it
without interpolating whole maps again for every random partner.

Letters in names: M maps, B point sets, C channels, h w grid, S points along each axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PointRows:
    """The four grid cells around each point, and their bilinear weights.

    Attributes:
        index: (B, S * S, 4) int64 cell of the flattened grid.
        weight: (B, S * S, 4) float32, rows sum to 1.
        samples: S.
        cells: h * w.
    """

    index: Tensor
    weight: Tensor
    samples: int
    cells: int


def locate(coords_BSS2: Tensor, height: int, width: int) -> PointRows:
    """Find the cells around points, as `grid_sample(align_corners=True, padding border)` does.

    Args:
        coords_BSS2: points (x, y) in [-1, 1]; the two point axes are swapped, as in
            `sample_points`.
        height: h of the grid.
        width: w of the grid.
    """
    points = coords_BSS2.transpose(1, 2).flatten(1, 2)
    x = ((points[..., 0] + 1) / 2 * (width - 1)).clamp(0, width - 1)
    y = ((points[..., 1] + 1) / 2 * (height - 1)).clamp(0, height - 1)
    left, top = x.floor(), y.floor()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    across, down = x - left, y - top
    rows = torch.stack([top, top, bottom, bottom], -1)
    columns = torch.stack([left, right, left, right], -1)
    weight = torch.stack(
        [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], -1
    )
    index = (rows * width + columns).long()
    return PointRows(index, weight, coords_BSS2.shape[1], height * width)


def sample_rows(maps_MChw: Tensor, rows: PointRows, which_B: Tensor | None = None) -> Tensor:
    """Sample maps at located points.

    Args:
        maps_MChw: maps; fastest when the channels lie next to each other in memory.
        rows: B point sets.
        which_B: the map of each point set; None: map b for set b.

    Returns:
        Values at the points, (B, C, S, S).
    """
    table = maps_MChw.permute(0, 2, 3, 1).reshape(-1, maps_MChw.shape[1])
    count = len(rows.index)
    maps = torch.arange(count, device=table.device) if which_B is None else which_B
    index = rows.index + maps[:, None, None] * rows.cells
    values: Tensor = F.embedding_bag(
        index.flatten(0, 1),
        table,
        mode="sum",
        per_sample_weights=rows.weight.flatten(0, 1).to(table.dtype),
    )
    side = rows.samples
    return values.view(count, side, side, -1).permute(0, 3, 1, 2)

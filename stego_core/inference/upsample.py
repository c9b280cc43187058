"""The largest of many bilinearly upsampled score maps, without upsampling most of them.

numpy only: the processes that write masks need no torch. Products and sums are single IEEE
operations in a fixed order, so a label map has the same bytes on every machine.

Legend: N clusters, h w grid, H W pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STRIP_BYTES = 64 * 2**10  # of one map; what a step works on stays in a core's own cache
# A cluster this far behind at all corners of a cell (as a share of the largest score) is behind
# inside of it whatever rounding does: an interpolated value is off by less than 4 * 2^-24.
_MARGIN = 1e-5


def interpolation_cells(size: int, grid: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the cell of each pixel along one axis, and the weight of the cell after it.

    Source: `F.interpolate(mode="bilinear", align_corners=False)`.

    >>> [part.tolist() for part in interpolation_cells(4, 2)]
    [[0, 0, 0, 1], [0.0, 0.25, 0.75, 0.0]]
    """
    centres = ((np.arange(size) + 0.5) * grid / size - 0.5).clip(0, grid - 1)
    low = np.floor(centres).astype(np.intp)
    return low, centres - low


def upsampled_argmax(scores_Nhw: NDArray[np.float32], height: int, width: int) -> np.ndarray:
    """Return argmax over N of the bilinearly upsampled scores; of equals the first.

    Works in strips of rows, so that an original of many megapixels takes no more memory than a
    small one, and in each strip only on clusters that can be largest somewhere in it.

    Args:
        scores_Nhw: scores on the token grid, float32.
        height: of the label map.
        width: of the label map.

    Returns:
        (height, width) uint8, or uint16 for more than 255 clusters.
    """
    count, grid_h = scores_Nhw.shape[:2]
    out: np.ndarray = np.zeros((height, width), np.uint8 if count <= 255 else np.uint16)
    low, weight = interpolation_cells(height, grid_h)
    high = (low + 1).clip(max=grid_h - 1)
    near, far = (part.astype(np.float32)[:, None] for part in (1 - weight, weight))
    wide = _widened(scores_Nhw, width)
    possible_Nh = np.asarray(_contenders(scores_Nhw).any(2))
    rows = max(1, _STRIP_BYTES // (4 * width))
    for start in range(0, height, rows):
        strip = slice(start, start + rows)
        cells = slice(low[strip][0], low[strip][-1] + 1)
        best = np.full(out[strip].shape, -np.inf, np.float32)
        labels = out[strip]
        for cluster in np.flatnonzero(possible_Nh[:, cells].any(1)):
            value = wide[cluster][low[strip]]
            value *= near[strip]
            value += wide[cluster][high[strip]] * far[strip]
            labels[value > best] = cluster
            np.maximum(best, value, out=best)
    return out


def _widened(scores_Nhw: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Return the scores upsampled along their rows: (N, h, W), the cheaper axis first."""
    low, weight = interpolation_cells(width, scores_Nhw.shape[2])
    high = (low + 1).clip(max=scores_Nhw.shape[2] - 1)
    wide: NDArray[np.float32] = scores_Nhw[:, :, low]
    wide *= (1 - weight).astype(np.float32)
    wide += scores_Nhw[:, :, high] * weight.astype(np.float32)
    return wide


def _contenders(scores_Nhw: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which clusters can be largest in which cell of the grid: (N, h, w).

    Inside a cell all values lie between those of its corners. A cluster that is behind another at
    all four corners is behind it everywhere in the cell.
    """
    padded = np.pad(scores_Nhw, ((0, 0), (0, 1), (0, 1)), mode="edge")
    _, h, w = scores_Nhw.shape
    corners = [padded[:, y : y + h, x : x + w] for y in (0, 1) for x in (0, 1)]
    leader = np.sum(np.stack(corners), 0).argmax(0)[None]
    margin = np.float32(_MARGIN) * np.abs(scores_Nhw).max()
    possible = np.zeros(scores_Nhw.shape, bool)
    for corner in corners:
        possible |= ~(corner < np.take_along_axis(corner, leader, 0) - margin)
    return possible

"""The alignment loss: an augmented copy should have the code of the place that it shows.

Letters in names: B images, K code channels, h w grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.errors import ShapeError
from stego_core.loss.cosine import cell_cosines


def alignment_loss(
    code_augmented_BKhw: Tensor, code_BKhw: Tensor, coords_Bhw2: Tensor, *, transposed: bool = False
) -> Tensor:
    """Compute the mean negative cosine of an augmented view's code with the view's own.

    Args:
        code_augmented_BKhw: code of the augmented views, (B, K, h, w).
        code_BKhw: code of the views themselves, (B, K, h', w'). The gradient flows to both.
        coords_Bhw2: where each cell of the augmented view lies in the view, as (x, y), (B, h, w,
            2); -1 and 1 are the outer edges of the image. See `images.augment.source_coords`.
        transposed: Read them as the original does: see `transpose_coords`.

    Returns:
        A scalar in [-1, 1].

    Raises:
        ShapeError: if the shapes disagree.
    Source: `aug_alignment_weight` of the original code, where it is 0; not in the paper.
    """
    if coords_Bhw2.shape != (len(code_BKhw), *code_augmented_BKhw.shape[2:], 2):
        raise ShapeError(
            f"code {tuple(code_augmented_BKhw.shape)} and coordinates {tuple(coords_Bhw2.shape)}: "
            "give one (x, y) for each cell of the augmented code"
        )
    if transposed:
        coords_Bhw2 = transpose_coords(coords_Bhw2)
    dtype = torch.promote_types(code_BKhw.dtype, torch.float32)
    shown = F.grid_sample(
        code_BKhw.to(dtype),
        coords_Bhw2.to(dtype),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return -cell_cosines(code_augmented_BKhw.to(dtype), shown).mean()


def transpose_coords(coords_Bhw2: Tensor) -> Tensor:
    """Return what the original's sampling makes of a coordinate map.

    The original keeps coordinates as (row, column), while its sampling takes (x, y) and swaps the
    two axes of the map. For the identity this cancels out; a horizontal flip becomes a vertical
    one, a crop of the upper half one of the left half.

    Args:
        coords_Bhw2: (x, y), (B, h, w, 2) with h equal to w.

    Raises:
        ShapeError: if the map isn't square.
    """
    if coords_Bhw2.shape[1] != coords_Bhw2.shape[2]:
        raise ShapeError(
            f"coordinates {tuple(coords_Bhw2.shape)} of a map that isn't square can't be "
            "transposed: switch compat.transposed_alignment off"
        )
    return coords_Bhw2.transpose(1, 2).flip(-1)

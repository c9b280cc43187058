"""Points where there are labels, and labels as features: two studies of the original.

Letters in names: B images, H W pixels, S points along each axis of a sample, N classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.errors import ShapeError

SALIENT_SHARE = 0.9  # of the points; the rest stays where it was drawn


def salient_points(
    coords_BSS2: Tensor, mask_BHW: Tensor, draws_2BSS: Tensor, *, grid: tuple[int, int]
) -> Tensor:
    """Move nine in ten points to pixels of a mask.

    Args:
        coords_BSS2: points as (x, y) in [-1, 1], drawn uniformly.
        mask_BHW: the pixels to draw from, with replacement, (B, H, W) bool; images without any
            keep their points.
        draws_2BSS: numbers in [0, 1): which points move, and to which pixel of the mask.
        grid: rows and columns of the maps that are sampled there; -1 and 1 are the centres of
            their first and last cells, as in `sample_points`.

    Returns:
        Points as (x, y) in [-1, 1], (B, S, S, 2).

    Raises:
        ShapeError: if the shapes disagree.
    Source: `use_salience` of the original code. A point is the centre of its pixel; the original
        takes the pixel's index over H, so half a pixel less, and only square masks.
    """
    if draws_2BSS.shape != (2, *coords_BSS2.shape[:3]) or len(mask_BHW) != len(coords_BSS2):
        raise ShapeError(
            f"points {tuple(coords_BSS2.shape)}, masks {tuple(mask_BHW.shape)} and draws "
            f"{tuple(draws_2BSS.shape)}: give (B, S, S, 2), (B, H, W) and (2, B, S, S)"
        )
    size = torch.tensor(mask_BHW.shape[1:]).to(coords_BSS2)
    cells = torch.tensor(grid).to(coords_BSS2)
    moves = draws_2BSS[0] < SALIENT_SHARE
    out = coords_BSS2.clone()
    for image, mask in enumerate(mask_BHW):
        pixels = mask.nonzero()  # (row, column)
        if not len(pixels):
            continue
        picked = pixels[(draws_2BSS[1, image] * len(pixels)).long().clamp(max=len(pixels) - 1)]
        place = (picked + 0.5) / size * cells - 0.5  # in cells of the grid
        found = (place / (cells - 1).clamp(min=1) * 2 - 1).clamp(-1, 1).flip(-1)
        out[image] = torch.where(moves[image, ..., None], found, coords_BSS2[image])
    return out


def one_hot_labels(labels_BHW: Tensor, num_classes: int) -> Tensor:
    """Return labels as features: one-hot of label + 1, so that unlabelled pixels are a class too.

    Args:
        labels_BHW: class ids, (B, H, W) int64; ids outside [0, num_classes) are unlabelled.
        num_classes: N.

    Returns:
        (B, N + 1, H, W) float32; channel 0 is "unlabelled".
    Source: `use_true_labels` of the original code.
    """
    known = (labels_BHW >= 0) & (labels_BHW < num_classes)
    index = torch.where(known, labels_BHW + 1, 0)
    return F.one_hot(index, num_classes + 1).permute(0, 3, 1, 2).float()

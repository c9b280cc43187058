"""The CRF loss: near pixels of like colour should have like codes.

Letters in names: B images, K code channels, H W pixels, h w grid, P sampled pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.errors import ShapeError
from stego_core.loss.cosine import unit_cells

# The constants of the original's training configuration.
SIDE = 56  # images and code are resized to squares of this many pixels
POINTS = 1000  # pixels that are compared with each other
POSITION_SCALE, COLOR_SCALE, NEAR_SCALE = 0.5, 0.15, 0.05
COLOR_WEIGHT, NEAR_WEIGHT = 10.0, 3.0
SHIFT = 0.0


def crf_loss(images_B3HW: Tensor, code_BKhw: Tensor, pixels_P2: Tensor) -> Tensor:
    """Compute the mean negative product of a colour kernel and code cosines over pairs of pixels.

    Kernel of two pixels at squared distance d² in pixels and g² in colour: COLOR_WEIGHT ·
    exp(-d² / (2 POSITION_SCALE) - g² / (2 COLOR_SCALE)) + NEAR_WEIGHT · exp(-d² / (2 NEAR_SCALE))
    - SHIFT.

    Args:
        images_B3HW: images as the backbone sees them, normalised, (B, 3, H, W).
        code_BKhw: code, (B, K, h, w); the gradient flows to it alone.
        pixels_P2: (row, column) in [0, SIDE), (P, 2) int64, the same for all images.

    Returns:
        A scalar.

    Raises:
        ShapeError: if images and code differ in B.
    Source: `crf_weight` of the original code, where it is 0, written from its description.
    """
    if images_B3HW.ndim != 4 or code_BKhw.ndim != 4 or len(images_B3HW) != len(code_BKhw):
        raise ShapeError(
            f"images {tuple(images_B3HW.shape)} and code {tuple(code_BKhw.shape)}: give "
            "(B, 3, H, W) and (B, K, h, w)"
        )
    rows, columns = pixels_P2.unbind(1)
    with torch.no_grad():
        colors_B3P = _resize(images_B3HW)[:, :, rows, columns]
        positions = pixels_P2.T.to(colors_B3P)
        apart = _squared_distances(positions[None])
        kernel = COLOR_WEIGHT * torch.exp(
            -apart / (2 * POSITION_SCALE) - _squared_distances(colors_B3P) / (2 * COLOR_SCALE)
        )
        kernel += NEAR_WEIGHT * torch.exp(-apart / (2 * NEAR_SCALE)) - SHIFT
    codes_BKP = unit_cells(_resize(code_BKhw))[:, :, rows, columns]
    cosines = torch.bmm(codes_BKP.transpose(1, 2), codes_BKP)
    return -(kernel.to(cosines.dtype) * cosines).mean()


def _resize(maps: Tensor) -> Tensor:
    return F.interpolate(maps, (SIDE, SIDE), mode="bilinear", align_corners=False)


def _squared_distances(points_BCP: Tensor) -> Tensor:
    """Return (B, P, P); channel by channel, so that no tensor of all channels is held."""
    count = points_BCP.shape[2]
    total = points_BCP.new_zeros(len(points_BCP), count, count)
    for values_BP in points_BCP.unbind(1):
        total += (values_BP[:, :, None] - values_BP[:, None, :]).square()
    return total

"""Label maps from maps of scores, at any size, with bounded memory.

Legend: N clusters, h w grid, H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stego_core.inference import upsample
from stego_core.masks.table import Segmentation


def interpolation_matrix(size: int, grid: int) -> Tensor:
    """Return the matrix of bilinear upsampling along one axis: (size, grid) float32.

    Row p holds the weights of the grid cells for pixel p, as `F.interpolate(mode="bilinear",
    align_corners=False)` has them.
    """
    low, weight = (torch.from_numpy(part) for part in upsample.interpolation_cells(size, grid))
    high = (low + 1).clamp(max=grid - 1)
    matrix = torch.zeros(size, grid, dtype=torch.float64)
    rows = torch.arange(size)
    matrix[rows, low] += 1 - weight
    matrix[rows, high] += weight
    return matrix.float()


def upsampled_argmax(scores_Nhw: Tensor, height: int, width: int) -> np.ndarray:
    """Return argmax over N of the bilinearly upsampled scores (see `inference.upsample`)."""
    return upsample.upsampled_argmax(scores_Nhw.float().cpu().numpy(), height, width)


def grid_confidence(
    products_Nhw: Tensor, code_Khw: Tensor, *, alpha: float
) -> tuple[np.ndarray, float]:
    """Return how sure the cluster probe is on the token grid.

    Args:
        products_Nhw: inner products of code and unit centroids.
        code_Khw: the code.
        alpha: sharpness of softmax(alpha * cosine); the method's value is 2, at which even a
            perfect match among 27 clusters has probability 0.22.

    Returns:
        Probability of the best cluster (h, w) float32 in [0, 1], and the mean entropy in nats.
    """
    norm = code_Khw.norm(dim=0).clamp_min(1e-10)
    log_probs = torch.log_softmax(alpha * products_Nhw / norm, 0)
    entropy = -(log_probs.exp() * log_probs).sum(0).mean()
    return log_probs.max(0).values.exp().cpu().numpy().astype(np.float32), float(entropy)


def segment(
    products_Nhw: Tensor, code_Khw: Tensor, *, height: int, width: int, alpha: float
) -> Segmentation:
    """Return the segmentation of one image from its products and code (see `Segmenter`)."""
    confidence, entropy = grid_confidence(products_Nhw, code_Khw, alpha=alpha)
    return Segmentation(upsampled_argmax(products_Nhw, height, width), confidence, entropy)

"""Smoothing of codes inside an image: tokens with similar features share their codes.

It is attention of an image to itself, with the features as queries and keys. Parts of one thing
agree on a code, and single tokens that stray are outvoted; edges stay where the features change.

Letters in names: B images, D feature channels, K code channels, h w grid.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def smooth_code(code_BKhw: Tensor, features_BDhw: Tensor, *, temperature: float) -> Tensor:
    """Return codes averaged with weights softmax(cosine of features / temperature).

    Args:
        code_BKhw: codes; the result is linear in them.
        features_BDhw: features of the same grid; need not be normalised.
        temperature: the smaller, the fewer tokens share; 0 returns the codes as they are.

    Returns:
        (B, K, h, w), of the codes' dtype.
    """
    if temperature <= 0:
        return code_BKhw
    directions = F.normalize(features_BDhw, dim=1).flatten(2).transpose(1, 2)
    values = code_BKhw.flatten(2).transpose(1, 2)
    # Never builds the (h w)^2 weights where torch has a kernel that streams them.
    mixed = F.scaled_dot_product_attention(
        directions.to(values), directions.to(values), values, scale=1 / temperature
    )
    return mixed.transpose(1, 2).reshape(code_BKhw.shape)

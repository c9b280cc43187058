"""CAUSE's contrast: codes whose features are of like concepts attract, of unlike ones repel.

Letters in names: B images, P points of an image, Q keys, K code channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# From the published code.
_TEMPERATURE = 0.07
_POSITIVE = 0.3
_NEGATIVE = 0.1


def contrast_codes(codes_BPK: Tensor, keys_QK: Tensor, likeness_BPQ: Tensor) -> Tensor:
    """Compute InfoNCE of codes and keys, with several positives for each code.

    A positive pair costs -s / 0.07 + log of the sum of exp(s / 0.07) over the code's positive and
    negative keys, s the cosine of code and key.

    Args:
        codes_BPK: codes; the gradient flows to them alone.
        keys_QK: codes of a teacher, without gradient.
        likeness_BPQ: likeness of the concepts of codes and keys: pairs above 0.3 are positive,
            below 0.1 negative; those between, and NaN, don't count.

    Returns:
        The mean over all positive pairs of each image, (B,); 0 for an image without any.
    Source: Kim et al., "Causal Unsupervised Semantic Segmentation" (CAUSE), 2023, and its
        published code.
    """
    scores = F.normalize(codes_BPK, dim=2) @ F.normalize(keys_QK.detach(), dim=1).T / _TEMPERATURE
    is_positive = likeness_BPQ > _POSITIVE
    counted = scores.masked_fill(~(is_positive | (likeness_BPQ < _NEGATIVE)), -torch.inf)
    num_positive = is_positive.sum(2)
    # Codes without positives cost nothing; the logarithm of an empty sum would spoil the gradient.
    counted = counted.where((num_positive > 0)[:, :, None], 0.0)
    costs = num_positive * counted.logsumexp(2) - (scores * is_positive).sum(2)
    return costs.sum(1) / num_positive.sum(1).clamp_min(1)

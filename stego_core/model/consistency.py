"""Consistency: weight for directions that matched tokens of different images agree in.

Whitening gives every direction the same weight. But tokens of the same thing in two images differ
in some directions (light, position, the film they are from) and agree in others. What STEGO learns
step by step, similar codes where features correspond, has a linear part in closed form: scale each
direction by how well it agrees over correspondences. ADR 0015 has the measurements.

Letters in names: T tokens, P pairs of matched tokens, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stego_core.errors import ShapeError

# Directions in which matched tokens agree perfectly would get infinite weight. In units of the
# mean disagreement.
_RIDGE = 0.1
_SMALLEST_SHARE = 1e-4
# Temperature at which tokens in whitened space are smoothed before their variance is taken.
SMOOTHING = 0.15


def consistent_projection(tokens_TD: Tensor, differences_PD: Tensor) -> Tensor:
    """Return the linear map that makes directions equal in variance, then scales them.

    The scale of a direction is (disagreement + ridge)^(-1/2). The disagreement is the variance of
    the differences of matched tokens, in units of the tokens' own variance.

    Args:
        tokens_TD: tokens, T at least 2.
        differences_PD: differences of matched tokens; without any the variances are made equal and
            nothing is scaled.

    Returns:
        (D, D) float32; symmetric root first, so that no direction is turned without need.

    Raises:
        ShapeError: if the two disagree in D.
    Source: relevant component analysis (Bar-Hillel et al. 2003), with mined correspondences in the
        place of given equivalences.
    """
    if tokens_TD.ndim != 2 or tokens_TD.shape[1:] != differences_PD.shape[1:]:
        raise ShapeError(
            f"tokens {tuple(tokens_TD.shape)} and differences {tuple(differences_PD.shape)}: give "
            "(T, D) and (P, D)"
        )
    tokens, differences = tokens_TD.double(), differences_PD.double()
    centred = tokens - tokens.mean(0)
    equal = _inverse_root(centred.T @ centred / len(tokens), _SMALLEST_SHARE)
    if not len(differences):
        return equal.float()
    spread = equal @ (differences.T @ differences / len(differences)) @ equal
    mean = (spread.diagonal().mean()).clamp_min(torch.finfo(spread.dtype).tiny)
    ridge = _RIDGE * torch.eye(len(spread), dtype=spread.dtype, device=spread.device)
    return (_inverse_root(spread / mean + ridge, 0.0) @ equal).float()


def _inverse_root(matrix_DD: Tensor, smallest_share: float) -> Tensor:
    """Return the inverse symmetric root; eigenvalues below a share of the mean count as it."""
    values, vectors = torch.linalg.eigh(matrix_DD)
    floor = (smallest_share * values.mean()).clamp_min(torch.finfo(values.dtype).eps)
    root: Tensor = (vectors * values.clamp_min(floor).rsqrt()) @ vectors.T
    return root

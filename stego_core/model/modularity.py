"""Clusters by graph modularity: points of one cluster are tied more than their degrees explain.

Letters in names: N points, P points of a step, D dimensions, M prototypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# From CAUSE's published code.
_TEMPERATURE = 0.1
_LEARNING_RATE = 1e-3
# A step's graph has its square of edges; enough points for every cluster to have some.
_STEP_POINTS = 512
_STEPS = 500  # four to five passes over the default sample


def modularity(points_PD: Tensor, prototypes_MD: Tensor) -> Tensor:
    """Compute trace(W / e · delta) of the graph of points.

    The graph A holds the cosines of the points, 0 where negative and on the diagonal; W = A -
    d dᵀ / e with the degrees d and their sum e. With c the cosines of points and prototypes, 0
    where negative, delta_pq = max_k tanh(c_pk c_qk / 0.1) tells how surely two points share a
    prototype.

    Args:
        points_PD: points, (P, D); only their directions count.
        prototypes_MD: prototypes, (M, D); the gradient flows to them.

    Returns:
        A scalar, at most 1; higher is better.
    Source: Kim et al., "Causal Unsupervised Semantic Segmentation" (CAUSE), 2023, and its
        published code.
    """
    unit_PD = F.normalize(points_PD, dim=1)
    with torch.no_grad():
        graph_PP = (unit_PD @ unit_PD.T).clamp(min=0).fill_diagonal_(0)
        degrees = graph_PP.sum(1)
        total = degrees.sum().clamp_min(1e-12)
        excess_PP = (graph_PP - torch.outer(degrees, degrees) / total) / total
    near_PM = (unit_PD @ F.normalize(prototypes_MD, dim=1).T).clamp(min=0)
    shared_PP = _best_shared(near_PM.detach())
    rows = torch.arange(len(unit_PD), device=unit_PD.device)
    products_PP = near_PM[rows[:, None], shared_PP] * near_PM[rows[None], shared_PP]
    return (excess_PP * torch.tanh(products_PP / _TEMPERATURE)).sum()


def _best_shared(near_PM: Tensor) -> Tensor:
    """Return argmax_k c_pk c_qk, (P, P), one prototype after the other: never (P, P, M) at once."""
    best = torch.outer(near_PM[:, 0], near_PM[:, 0])
    index = torch.zeros_like(best, dtype=torch.long)
    for number, column in enumerate(near_PM.T[1:], start=1):
        product = torch.outer(column, column)
        is_better = product > best
        best = torch.where(is_better, product, best)
        index = torch.where(is_better, number, index)
    return index


def raise_modularity(
    points_ND: Tensor, start_MD: Tensor, *, seed: int, steps: int = _STEPS
) -> Tensor:
    """Move prototypes so that the modularity of samples of the points grows.

    Args:
        points_ND: points, (N, D); only their directions count.
        start_MD: where the prototypes start, (M, D).
        seed: of the samples.
        steps: of Adam, each on a sample of the points.

    Returns:
        Unit prototypes, (M, D), on the points' device.
    """
    generator = torch.Generator().manual_seed(seed)
    unit_ND = F.normalize(points_ND, dim=1)
    prototypes_MD = F.normalize(start_MD, dim=1).to(unit_ND).requires_grad_()
    optimizer = torch.optim.Adam([prototypes_MD], lr=_LEARNING_RATE)
    with torch.enable_grad():
        for _ in range(steps):
            picks = torch.randperm(len(unit_ND), generator=generator)[:_STEP_POINTS]
            optimizer.zero_grad()
            (-modularity(unit_ND[picks], prototypes_MD)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return F.normalize(prototypes_MD.detach(), dim=1)

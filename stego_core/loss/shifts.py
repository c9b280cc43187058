"""Shifts that follow the batch: where attraction ends and repulsion begins, without a number."""

from __future__ import annotations

from torch import Tensor

# The constant of EAGLE's published code: random pairs are pushed apart harder than others.
_RANDOM_FACTOR = 3.5


def adaptive_shift(kind: str, feature_mean: Tensor, code_mean: Tensor) -> Tensor:
    """Compute the shift of one kind of pair from the mean correspondences of a batch.

    |F - S| for self and knn: features and code should agree, and the farther they are apart, the
    fewer pairs attract. 3.5 (F + S) for random: the more alike unrelated views look, in features
    or in code, the more of their pairs repel.

    Args:
        kind: `self`, `knn` or `random`.
        feature_mean: F, the mean feature correspondence of these pairs over the whole batch,
            a scalar in [-1, 1]. Workers that share a batch pass the mean over all ranks.
        code_mean: S, the mean code correspondence of the same pairs, a scalar in [-1, 1].

    Returns:
        The shift, a scalar without gradient.
    Source: the code published with Kim et al., "EAGLE: Eigen Aggregation Learning for
        Object-Centric Unsupervised Semantic Segmentation", CVPR 2024, with its `bias` at 0.
    """
    features, code = feature_mean.detach(), code_mean.detach()
    if kind == "random":
        return _RANDOM_FACTOR * (features + code)
    return (features - code).abs()

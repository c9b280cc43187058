"""Whitening: equal weight for every direction that features vary in, and what follows from it.

A few directions hold most of the variance of self-supervised features, and they are not those that
tell classes apart: cosines, and so correspondences and k-means, hardly see the rest. ADR 0013 has
the measurements.

What lies beyond the components that are scaled, the details, can be kept beside them for linear
probes. ADR 28 has the measurements.

Letters in names: T tokens, C feature channels, D whitened channels, E details, B images, h w grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stego_core.errors import ShapeError

# Variance below this share of the largest counts as this share: rounding is not a direction.
_SMALLEST_SHARE = 1e-6
_SMALLEST_VARIANCE = 1e-12  # where all tokens are the same
_DETAIL_SHARE = 0.5  # of the deviation that details have in units of the last whitened component's


class Whitening(nn.Module):
    """Project directions of features on their principal components, each scaled to variance 1.

    Args:
        mean: (C,) mean of the unit tokens.
        projection: (D, C) rows are components divided by their standard deviation.
        detail: (E, C) further components, which are not part of the result; None is none.

    Raises:
        ShapeError: if they disagree in C.
    """

    mean: Tensor
    projection: Tensor
    detail: Tensor | None

    def __init__(self, mean: Tensor, projection: Tensor, detail: Tensor | None = None) -> None:
        super().__init__()
        for name, matrix in (("projection", projection), ("detail", detail)):
            if matrix is None:
                continue
            if mean.ndim != 1 or matrix.ndim != 2 or matrix.shape[1] != len(mean):
                raise ShapeError(
                    f"mean {tuple(mean.shape)} and {name} {tuple(matrix.shape)}: give (C,) "
                    "and (D, C)"
                )
        self.register_buffer("mean", mean)
        self.register_buffer("projection", projection)
        self.register_buffer("detail", detail)

    @property
    def width(self) -> int:
        """Return D."""
        return len(self.projection)

    @property
    def num_details(self) -> int:
        """Return E."""
        return 0 if self.detail is None else len(self.detail)

    def followed_by(self, map_DD: Tensor) -> Whitening:
        """Return a whitening whose result is mapped by `map_DD` before it is made unit length."""
        return Whitening(self.mean, map_DD @ self.projection, self.detail)

    def project(self, tokens_TC: Tensor) -> Tensor:
        """Return whitened unit tokens, (T, D)."""
        maps_TC11 = tokens_TC[:, :, None, None]
        whitened: Tensor = self(maps_TC11)
        return whitened[:, :, 0, 0]

    def forward(self, features_BChw: Tensor) -> Tensor:
        """Return whitened unit vectors, (B, D, h, w)."""
        return F.normalize(self._project(features_BChw, self.projection), dim=1)

    def details(self, features_BChw: Tensor) -> Tensor:
        """Return the details of unit features, (B, E, h, w); E is 0 where none were kept."""
        if self.detail is None:
            return features_BChw[:, :0]
        return self._project(features_BChw, self.detail)

    def _project(self, features_BChw: Tensor, components: Tensor) -> Tensor:
        centred = F.normalize(features_BChw, dim=1) - self.mean.view(1, -1, 1, 1)
        return F.conv2d(centred, components[:, :, None, None])


def principal_scaling(tokens_TC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return mean (C,) and the `count` widest principal components over their deviation (D, C).

    D is at most T and C. The arithmetic is float64 and the sign of a component is fixed by its
    largest entry, so that the result follows from the tokens alone.
    """
    tokens = tokens_TC.double()
    mean = tokens.mean(0)
    centred = tokens - mean
    variances, components = torch.linalg.eigh(centred.T @ centred / len(tokens))
    keep = min(count, len(tokens), tokens.shape[1])
    variances, components = variances.flip(0)[:keep], components.flip(1)[:, :keep].T
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    smallest = (_SMALLEST_SHARE * variances[0]).clamp_min(_SMALLEST_VARIANCE)
    scale = torch.sign(largest) / variances.clamp_min(smallest).sqrt()[:, None]
    return mean.float(), (components * scale).float()


def fit_whitening(tokens_TC: Tensor, dim: int, *, details: int = 0) -> Whitening:
    """Return the whitening of a sample of tokens with at most `dim` components.

    At most `details` further components keep half the deviation that they have in units of the
    last whitened one's, so that a penalty on a linear probe's weights holds back those that vary
    little.
    """
    mean, components = principal_scaling(F.normalize(tokens_TC, dim=1), dim + details)
    if len(components) <= dim:
        return Whitening(mean, components)
    deviations = 1 / torch.linalg.vector_norm(components, dim=1, keepdim=True)
    scale = _DETAIL_SHARE * deviations[dim:] / deviations[dim - 1]
    return Whitening(mean, components[:dim], components[dim:] * scale)

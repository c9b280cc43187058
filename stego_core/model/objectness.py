"""Objectness: how much a token belongs to a thing rather than to what surrounds things.

The widest principal component of self-supervised features separates the two (0.97 area under the
ROC curve on the masks of a VOC subset, where the class token's cosine reaches 0.89; ADR 0016).
Surroundings fill most pixels and vary a lot, so clustering all tokens alike spends most clusters on
them.

Letters in names: T tokens, C feature channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.errors import ShapeError
from stego_core.model.whitening import principal_scaling

_COMPONENTS = 64
_SMALLEST_DEVIATION = 1e-6  # where all tokens are the same
_BISECTIONS = 50
_STEEPEST = 8.0  # beyond e^8 between tokens one deviation apart, only the extreme ones count


@dataclass(frozen=True, slots=True)
class Objectness:
    """Objectness as it was found on a sample of tokens.

    Attributes:
        mean: (C,) of the unit features.
        components: (P, C) scaled principal components.
        centre: mean of the first component's part of a token's length.
        scale: standard deviation of it; negative where things have the lower part.
    """

    mean: Tensor
    components: Tensor
    centre: Tensor
    scale: Tensor

    def __call__(self, features_TC: Tensor) -> Tensor:
        """Return the objectness of tokens, (T,): mean 0 and variance 1 in the sample."""
        return (_first_part(features_TC, self.mean, self.components) - self.centre) / self.scale


def find_objectness(features_TC: Tensor, pull_T: Tensor) -> Objectness:
    """Return the objectness of tokens, higher for things, as a function of features.

    It is the first of the scaled principal components of the unit features, as a part of the
    token's length in all of them.

    Args:
        features_TC: features of a sample of tokens.
        pull_T: anything that tends to be higher on things; only the sign of its correlation
            counts. The cosine with the image's class token is best.

    Raises:
        ShapeError: if there isn't one pull for each token.
    """
    if features_TC.ndim != 2 or pull_T.shape != features_TC.shape[:1]:
        raise ShapeError(
            f"features {tuple(features_TC.shape)} and pull {tuple(pull_T.shape)}: give (T, C), (T,)"
        )
    mean, components = principal_scaling(F.normalize(features_TC.float(), dim=1), _COMPONENTS)
    along_T = _first_part(features_TC, mean, components)
    # In float64: sums of float32 depend on the number of threads.
    centre = along_T.double().mean().float()
    scale = along_T.double().std(correction=0).clamp_min(_SMALLEST_DEVIATION).float()
    pull_T = pull_T.float()
    sign = torch.sign(((along_T - centre) * (pull_T - pull_T.mean())).double().sum())
    return Objectness(mean, components, centre, scale if sign >= 0 else -scale)


def _first_part(features_TC: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    unit_TC = F.normalize(features_TC.float(), dim=1)
    return F.normalize((unit_TC - mean) @ components.T, dim=1)[:, 0]


@dataclass(frozen=True, slots=True)
class Balance:
    """Weights exp(b * objectness), with mean 1 in the sample that they were found on.

    Attributes:
        steepness: b.
        log_mean: logarithm of the sample's mean before it is made 1.
    """

    steepness: float
    log_mean: float

    def __call__(self, objectness_T: Tensor) -> Tensor:
        """Return the weights of tokens, (T,) float32."""
        return torch.exp(self.steepness * objectness_T.double() - self.log_mean).float()


def balance_background(objectness_T: Tensor, share: float) -> Balance:
    """Return weights that leave the background a given share of the weight.

    Args:
        objectness_T: standardised; tokens below 0 are background.
        share: of the total weight, that all background tokens get together, (0, 1]. If they are
            no more than that, all weights are 1.
    """
    objectness_T = objectness_T.double()
    background_T = objectness_T < 0

    def background(steepness: float) -> float:
        return float(torch.softmax(steepness * objectness_T, 0)[background_T].sum())

    low, high = 0.0, _STEEPEST
    if float(background_T.double().mean()) > share:
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if background(middle) > share else (low, middle)
    total = float(torch.logsumexp(low * objectness_T, 0))
    return Balance(low, total - math.log(len(objectness_T)))

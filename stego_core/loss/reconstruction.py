"""The reconstruction loss: a decoder should find the features in the code again."""

from __future__ import annotations

from torch import Tensor

from stego_core.loss.cosine import cell_cosines


def reconstruction_loss(decoded_BChw: Tensor, features_BChw: Tensor) -> Tensor:
    """Compute the mean negative cosine of decoded codes with the features they were made from.

    Args:
        decoded_BChw: what a decoder makes of the code, (B, C, h, w). The gradient flows through it
            to decoder and head.
        features_BChw: frozen features, (B, C, h, w). They get no gradient.

    Returns:
        A scalar in [-1, 1].

    Raises:
        ShapeError: if the shapes differ.
    Source: `rec_weight` of the original code, where it is 0; not in the paper.
    """
    return -cell_cosines(decoded_BChw, features_BChw.detach()).mean()

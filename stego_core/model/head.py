"""The head: projection of frozen features to the code, the only part that STEGO trains.

Letters in names: B images, C feature channels, K code channels, h w grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stego_core.config.method import HeadConfig
from stego_core.errors import ConfigError, ShapeError
from stego_core.model.decoder import DecoderBlock


class Head(nn.Module):
    """Project features to the code, at every grid cell alone except for `transformer`.

    `nonlinear`: W1 f + W3 ReLU(W2 f); `linear`: W1 f. All are 1x1 convolutions with bias; W2
    keeps the width. `transformer`: `nonlinear` after a `DecoderBlock`, so that a cell's code
    depends on the whole map. `none`: the code is f; W1 is the identity and isn't trained, so that
    what is fitted after training has a layer to be folded into.

    Args:
        width: C, channels of the features.
        config: kind and K, the channels of the code (for `none`, K is C). Its `dropout` isn't read
            here: masks are drawn by `dropout_masks` and passed to `forward`.
    Source: the projection of the original code; Hamilton et al. 2022 describe it in words only.
    """

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        self.width = width
        self.dim = width if config.kind == "none" else config.dim
        self.linear = nn.Conv2d(width, self.dim, kernel_size=1)
        self._is_trained = config.kind != "none"
        self.nonlinear: nn.Sequential | None = None
        self.block: DecoderBlock | None = None
        if config.kind == "transformer":
            # The other weights are those of a head without the block.
            with torch.random.fork_rng(devices=[]):
                self.block = DecoderBlock(width)
        if config.kind in ("nonlinear", "transformer"):
            self.nonlinear = nn.Sequential(
                nn.Conv2d(width, width, kernel_size=1),
                nn.ReLU(),
                nn.Conv2d(width, config.dim, kernel_size=1),
            )
        if not self._is_trained:
            self.start_as_identity()
            self.requires_grad_(False)

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Let the code be the first K channels of the features until training changes it.

        The nonlinear branch ends in zeros, so it is learned from nothing.
        """
        self.linear.weight.copy_(torch.eye(self.dim, self.width)[:, :, None, None])
        nn.init.zeros_(_bias(self.linear))
        if self.nonlinear is not None:
            last = self.nonlinear[2]
            assert isinstance(last, nn.Conv2d)  # noqa: S101 - built above
            nn.init.zeros_(last.weight)
            nn.init.zeros_(_bias(last))
        if self.block is not None:
            self.block.start_as_identity()

    @torch.no_grad()
    def project_code(self, mean_K: Tensor, projection_KK: Tensor) -> None:
        """Make `projection @ (code - mean)` the code: both branches end in a linear layer."""
        last = [self.linear]
        if self.nonlinear is not None:
            assert isinstance(self.nonlinear[2], nn.Conv2d)  # noqa: S101 - built above
            last.append(self.nonlinear[2])
        _bias(self.linear).sub_(mean_K)
        for layer in last:
            layer.weight.copy_(torch.einsum("ij,jkhw->ikhw", projection_KK, layer.weight))
            _bias(layer).copy_(projection_KK @ _bias(layer))

    def forward(
        self, features_BChw: Tensor, keep_masks: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Project features to the code.

        Args:
            features_BChw: backbone features, (B, C, h, w).
            keep_masks: channel dropout of the linear and of the nonlinear branch, (B, C, 1, 1)
                each, 0 for a dropped channel and 1/(1-p) for a kept one; a linear head uses the
                first only, `none` neither. None: no dropout. They come from outside so that any
                number of workers can draw the same masks.

        Returns:
            The code, (B, K, h, w).

        Raises:
            ShapeError: if the features have another width or a mask another shape.
        """
        if features_BChw.ndim != 4 or features_BChw.shape[1] != self.width:
            raise ShapeError(
                f"features {tuple(features_BChw.shape)}: this head needs (B, {self.width}, h, w)"
            )
        if self.block is not None:
            features_BChw = self.block(features_BChw)
        first = second = features_BChw
        if keep_masks is not None and self._is_trained:
            first, second = (_drop(features_BChw, mask) for mask in keep_masks)
        code: Tensor = self.linear(first)
        if self.nonlinear is not None:
            code = code + self.nonlinear(second)
        return code


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None  # noqa: S101 - every layer of the head has one
    return layer.bias


def dropout_masks(batch: int, channels: int, p: float, generator: torch.Generator) -> Tensor:
    """Draw channel dropout for a batch.

    Args:
        batch: B, images.
        channels: C, channels of the features.
        p: probability that a channel of an image is dropped, in [0, 1).
        generator: source of the randomness; the result lies on its device.

    Returns:
        0 for a dropped and 1/(1-p) for a kept channel, (B, C, 1, 1) float32.

    Raises:
        ConfigError: if p isn't in [0, 1).
    """
    if not 0 <= p < 1:
        raise ConfigError(f"head.dropout is {p}: choose a probability from 0 to below 1")
    draws = torch.rand(batch, channels, 1, 1, generator=generator, device=generator.device)
    return (draws >= p).float() / (1 - p)


def _drop(features_BChw: Tensor, keep_mask: Tensor) -> Tensor:
    if keep_mask.shape != (*features_BChw.shape[:2], 1, 1):
        raise ShapeError(
            f"dropout mask {tuple(keep_mask.shape)} for features {tuple(features_BChw.shape)}: "
            "give (B, C, 1, 1)"
        )
    return features_BChw * keep_mask.to(features_BChw.dtype)

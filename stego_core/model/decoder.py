"""One transformer block before the head: each token hears the others of its image.

Letters in names: B images, C channels, h w grid, T = h w tokens.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

# Width of the feed-forward part, in units of the channels.
_EXPANSION = 4


class DecoderBlock(nn.Module):
    """Add to each token what a transformer decoder layer makes of its image.

    The layer is attention of the tokens to themselves, attention to the features, and a
    feed-forward part, each with a residual and layer normalisation after it. It has no positions,
    so it takes grids of any size.

    Args:
        width: C, channels of the features.
    Source: the decoder head of Kim et al., "Causal Unsupervised Semantic Segmentation" (CAUSE),
        2023, and its published code. There queries are the features' nearest concepts with trained
        positions, the feed-forward part is 2048 wide, and the layer has dropout of its own.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(
            width, nhead=1, dim_feedforward=_EXPANSION * width, dropout=0.0, batch_first=True
        )

    def start_as_identity(self) -> None:
        """Let the layer add nothing until training changes it."""
        nn.init.zeros_(self.layer.norm3.weight)
        nn.init.zeros_(self.layer.norm3.bias)

    def forward(self, features_BChw: Tensor) -> Tensor:
        """Return the features with what the layer adds, (B, C, h, w)."""
        channels = features_BChw.shape[1]
        unit_BTC = F.normalize(features_BChw, dim=1).flatten(2).transpose(1, 2)
        # The layer's first weights expect channels of variance 1, not unit vectors.
        tokens_BTC = unit_BTC * math.sqrt(channels)
        added_BTC: Tensor = self.layer(tokens_BTC, tokens_BTC)
        return features_BChw + added_BTC.transpose(1, 2).reshape(features_BChw.shape)

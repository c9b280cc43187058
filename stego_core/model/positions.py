"""Learned positions at another image size, as the code of DINO and STEGO fits them.

Legend: h w grid, C channels, N cells of the grid that was learned, P prefix tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stego_core.errors import ConfigError


def fit_positions(
    positions_1PNC: Tensor, learned: tuple[int, int], grid: tuple[int, int], *, prefix: int
) -> Tensor:
    """Return learned positions for another grid.

    Args:
        positions_1PNC: (1, P + N, C), those of prefix tokens first, which stay as they are.
        learned: rows and columns of the N cells.
        grid: rows and columns that are wanted.
        prefix: P.

    Returns:
        (1, P + h * w, C).

    Source: `interpolate_pos_encoding` of DINO (Caron et al. 2021), which STEGO uses: bicubic
        without antialiasing, by the factor (h + 0.1) / sqrt(N).
    """
    if grid == learned:
        return positions_1PNC
    maps = positions_1PNC[:, prefix:].reshape(1, *learned, -1).permute(0, 3, 1, 2)
    # The tenth guards against a factor that rounds to a cell too few; places follow the factor.
    factors = tuple((cells + 0.1) / there for cells, there in zip(grid, learned, strict=True))
    fitted = F.interpolate(maps, scale_factor=factors, mode="bicubic")
    return torch.cat([positions_1PNC[:, :prefix], fitted.flatten(2).transpose(1, 2)], dim=1)


def use_original_positions(network: nn.Module, *, name: str) -> None:
    """Let a vision transformer of timm fit its positions as `fit_positions` does.

    Raises:
        ConfigError: if the network has no learned positions.
    """
    from timm.models.vision_transformer import VisionTransformer

    add_positions: Any = VisionTransformer._pos_embed
    is_plain = getattr(type(network), "_pos_embed", None) is add_positions
    if not is_plain or getattr(network, "pos_embed", None) is None:
        raise ConfigError(
            f"backbone.positions = original: backbone '{name}' has no learned positions, or adds "
            "them in a way of its own"
        )
    model: Any = network
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens

    def pos_embed(cells_BhwC: Tensor) -> Tensor:
        grid = (cells_BhwC.shape[1], cells_BhwC.shape[2])
        learned = tuple(model.patch_embed.grid_size)
        # timm's own way to add them, for a network that was made for this size.
        sized = SimpleNamespace(
            cls_token=model.cls_token,
            reg_token=model.reg_token,
            no_embed_class=model.no_embed_class,
            pos_drop=model.pos_drop,
            pos_embed=fit_positions(model.pos_embed, learned, grid, prefix=prefix),
            dynamic_img_size=False,
        )
        found: Tensor = add_positions(sized, cells_BhwC.flatten(1, 2))
        return found

    model._pos_embed = pos_embed  # timm has no other place for it

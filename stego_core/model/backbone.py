"""The frozen network: images to feature maps, one interface for every architecture of timm.

Legend: B images, H W pixels, C feature channels, h w grid, N tokens.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stego_core.config.schema import BackboneConfig
from stego_core.errors import ConfigError, ShapeError
from stego_core.model.keys import attention_keys, key_projection, last_attention
from stego_core.model.positions import use_original_positions
from stego_core.model.registry import (
    BackboneRecord,
    build_network,
    find_backbone,
    fit_state,
    random_state,
)
from stego_core.model.weights import ResolvedWeights, read_state, resolve_weights


class _Plan(NamedTuple):
    """Which maps are read, and what they look like."""

    indices: list[int]
    patch_size: int
    width: int
    use_keys: bool


class Backbone(nn.Module):
    """A frozen network that turns images into features at every cell of a grid.

    It stays in eval mode whatever `train()` is called on, and no gradient passes through it.
    Build it with `load_backbone`.

    Attributes:
        record: what timm knows of the network.
        weights: which weights it has.
        patch_size: pixels per grid cell; H and W must be multiples of it.
        width: C, channels of the returned features.
        precision: `fp32` or `bf16`.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: _Plan,
        *,
        record: BackboneRecord,
        weights: ResolvedWeights,
        precision: str,
    ) -> None:
        super().__init__()
        self.record = record
        self.weights = weights
        self.patch_size = plan.patch_size
        self.width = plan.width
        self.precision = precision
        self._network = network
        self._plan = plan
        for name, values in (("_mean", record.mean), ("_std", record.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode, whatever `mode` says."""
        return super().train(False)

    def prepare(self, pixels_BHWC: Tensor) -> Tensor:
        """Normalise pixels as the weights were trained.

        Args:
            pixels_BHWC: uint8 RGB, (B, H, W, 3), on any device.

        Returns:
            float32, (B, 3, H, W), on the backbone's device.

        Raises:
            ShapeError: if the pixels have another shape or type.
        """
        if pixels_BHWC.ndim != 4 or pixels_BHWC.shape[3] != 3 or pixels_BHWC.dtype != torch.uint8:
            raise ShapeError(
                f"pixels {tuple(pixels_BHWC.shape)} {pixels_BHWC.dtype}: the backbone needs "
                "(B, H, W, 3) uint8"
            )
        mean, std = self.get_buffer("_mean"), self.get_buffer("_std")
        images = pixels_BHWC.to(mean.device).permute(0, 3, 1, 2).contiguous().float()
        return images.div_(255).sub_(mean).div_(std)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the features of a batch.

        Args:
            images_BCHW: from `prepare`, (B, 3, H, W); H and W multiples of `patch_size`. Learned
                positions are interpolated to the grid.

        Returns:
            float32 features, (B, C, H / patch_size, W / patch_size).

        Raises:
            ShapeError: if the images have another shape, or the network takes one size only.
        """
        return self.with_class_token(images_BCHW)[0]

    def with_class_token(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the features, as `forward` does, and the class token beside them.

        Returns:
            Features, and the class token's own features (B, C) in the same space, float32; None
            where the network has no class token.

        Raises:
            ShapeError: as `forward`.
        """
        shape, side = tuple(images_BCHW.shape), self.patch_size
        if len(shape) != 4 or shape[1] != 3 or shape[2] % side or shape[3] % side or 0 in shape[2:]:
            raise ShapeError(
                f"images {shape}: backbone '{self.record.name}' needs (B, 3, H, W) with H and W "
                f"multiples of {side} pixels"
            )
        kind, use_bf16 = images_BCHW.device.type, self.precision == "bf16"
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=use_bf16):
            features, token_BC = self._features(images_BCHW)
        grid = (shape[2] // side, shape[3] // side)
        if tuple(features.shape[2:]) != grid:
            raise ShapeError(
                f"backbone '{self.record.name}' gives a grid of {tuple(features.shape[2:])} "
                f"for images {shape}, not {grid}; choose another one"
            )
        # One layout whatever the network: what follows chooses its arithmetic by it.
        return features.float().contiguous(), None if token_BC is None else token_BC.float()

    def _features(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        inputs: list[Tensor] = []
        attention = last_attention(self._network) if self._plan.use_keys else None
        hook = None
        if attention is not None:
            thread = threading.get_ident()  # others may be in the same network at the same time

            def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                if threading.get_ident() == thread:
                    inputs.append(args[0])

            hook = attention.register_forward_pre_hook(keep)
        has_prefix = self.record.is_transformer and self.record.prefix_tokens > 0
        registers = int(getattr(self._network, "num_reg_tokens", 0))
        has_token = has_prefix and self.record.prefix_tokens > registers
        try:
            found: list[Any] = self._network.forward_intermediates(  # type: ignore[operator]
                images_BCHW,
                indices=self._plan.indices,
                norm=True,
                stop_early=True,
                output_fmt="NCHW",
                intermediates_only=True,
                # Networks without prefix tokens don't know the argument.
                **({"return_prefix_tokens": True} if has_prefix else {}),
            )
        except AssertionError as error:  # networks of one fixed image size say so by assertion
            raise ShapeError(
                f"images {tuple(images_BCHW.shape)}: backbone '{self.record.name}' can't take "
                f"this size ({error})"
            ) from error
        finally:
            if hook is not None:
                hook.remove()
        maps = [entry[0] for entry in found] if has_prefix else found
        # Of all prefix tokens (registers follow) the first is the class token.
        tokens = [entry[1][:, 0] for entry in found] if has_token else []
        if attention is None:
            return torch.cat(maps, dim=1), torch.cat(tokens, dim=1) if has_token else None
        keys_BNC = attention_keys(attention, inputs[0])
        patches_BCN = keys_BNC[:, self.record.prefix_tokens :].transpose(1, 2)
        features = patches_BCN.reshape(len(keys_BNC), self.width, *maps[0].shape[2:])
        return features, keys_BNC[:, 0] if has_token else None


def load_backbone(
    config: BackboneConfig, *, device: str = "cpu", sha256: str | None = None
) -> Backbone:
    """Build a backbone and load its weights.

    Args:
        config: name, weights, kind of feature and precision.
        device: where it runs, as torch names it.
        sha256: of the weights that another process of the job, or the model, has.

    Raises:
        ConfigError: if the name is not known, the network has no such features, or no weights
            can be found.
        CheckpointError: if the weights don't fit, or are others than those of `sha256`.
        InputError: if the weights file can't be read.
    """
    record = find_backbone(config.name)
    network = build_network(record.timm_name)
    plan = _plan_features(network, record, config)
    weights = resolve_weights(record, config.weights)
    weights.refuse_others(sha256)
    if weights.path is None:
        state = random_state(record)
    else:
        state = fit_state(read_state(weights.path), record, weights.source)
    network.load_state_dict(state, strict=True)
    if config.positions == "original":
        use_original_positions(network, name=config.name)
    precision = resolve_precision(config.precision, device)
    backbone = Backbone(network, plan, record=record, weights=weights, precision=precision)
    return backbone.to(device)


def resolve_precision(precision: str, device: str) -> str:
    """Return `fp32` or `bf16`; `auto` takes bf16 only where the hardware computes in it.

    Args:
        precision: `auto`, `fp32` or `bf16`.
        device: as torch names it, such as `cpu` or `cuda:0`.
    """
    if precision != "auto":
        return precision
    kind = torch.device(device).type
    if kind == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        # Without these instructions bf16 is emulated and slower than fp32. torch has the
        # questions under these names only; a version without them gets fp32.
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        has_bf16 = any(getattr(torch.cpu, name, bool)() for name in names)
    else:
        has_bf16 = False
    return "bf16" if has_bf16 else "fp32"


def _plan_features(network: nn.Module, record: BackboneRecord, config: BackboneConfig) -> _Plan:
    levels: Any = network.feature_info
    last = len(levels) - 1
    if config.feature == "last":
        return _Plan([last], record.patch_size, record.width, use_keys=False)
    if config.feature == "key":
        attention = last_attention(network) if record.is_transformer else None
        if attention is None:
            raise ConfigError(
                f"backbone '{record.name}' has no attention keys; use --backbone.feature last"
            )
        width = key_projection(attention)[0].shape[0]
        return _Plan([last], record.patch_size, width, use_keys=True)
    indices = sorted(block + len(levels) if block < 0 else block for block in config.blocks)
    if not indices or indices[0] < 0 or indices[-1] > last or len(set(indices)) < len(indices):
        raise ConfigError(
            f"backbone.blocks = {list(config.blocks)}: backbone '{record.name}' has blocks 0 to "
            f"{last}; name each at most once"
        )
    sides = {int(levels[index]["reduction"]) for index in indices}
    if len(sides) > 1:
        raise ConfigError(
            f"backbone.blocks = {list(config.blocks)}: in backbone '{record.name}' these have "
            f"cells of different size ({sorted(sides)} pixels); choose blocks of one size"
        )
    width = sum(int(levels[index]["num_chs"]) for index in indices)
    return _Plan(indices, sides.pop(), width, use_keys=False)

"""Keys of the last block's attention, as features (`backbone.feature = "key"`).

Letters in names: B images, N tokens, C channels of all heads side by side.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def last_attention(network: nn.Module) -> nn.Module | None:
    """Return the attention of a plain transformer's last block; None where there is none."""
    blocks = getattr(network, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        return None
    attention = getattr(blocks[-1], "attn", None)
    projections = (getattr(attention, name, None) for name in ("qkv", "k_proj"))
    return attention if any(isinstance(part, nn.Linear) for part in projections) else None


def key_projection(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias that make the keys of all heads, side by side."""
    if getattr(attention, "k_proj", None) is not None:
        return attention.k_proj.weight, attention.k_proj.bias
    weight, bias = attention.qkv.weight.chunk(3)[1], attention.qkv.bias
    if bias is None:  # some networks keep it apart from the projection
        return weight, getattr(attention, "k_bias", None)
    return weight, bias.chunk(3)[1]


def attention_keys(attention: Any, tokens_BNC: Tensor) -> Tensor:
    """Return the keys as attention compares them, before any rotation by position: (B, N, C)."""
    keys_BNC = F.linear(tokens_BNC, *key_projection(attention))
    norm = getattr(attention, "k_norm", None)
    if norm is None:
        return keys_BNC
    heads = getattr(attention, "num_kv_heads", None) or attention.num_heads
    per_head: Tensor = norm(keys_BNC.reshape(*keys_BNC.shape[:2], heads, -1))
    return per_head.flatten(2)

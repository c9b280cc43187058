"""Names of backbones, what timm knows of them, and which tensors fit them.

Short names stand for the self-supervised families; every other name of timm works too.
What timm states about a network (normalisation, width, licence) is read from timm, never repeated.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from stego_core.errors import CheckpointError, ConfigError

RANDOM_SEED = 0

# `resnet50` is trained on ImageNet's labels: timm has no self-supervised one. A DINO ResNet-50
# file given as explicit weights fits it.
_SHORT_NAMES = {
    "dino-vits8": "vit_small_patch8_224.dino",
    "dino-vits16": "vit_small_patch16_224.dino",
    "dino-vitb8": "vit_base_patch8_224.dino",
    "dino-vitb16": "vit_base_patch16_224.dino",
    "dinov2-vits14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2-vitb14": "vit_base_patch14_dinov2.lvd142m",
    "dinov2-vitl14": "vit_large_patch14_dinov2.lvd142m",
    "dinov2-vits14-reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2-vitb14-reg": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2-vitl14-reg": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov3-vits16": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3-vitb16": "vit_base_patch16_dinov3.lvd1689m",
    "resnet50": "resnet50.a1_in1k",
}


@dataclass(frozen=True, slots=True)
class BackboneRecord:
    """What is known of a backbone before its weights are read.

    Attributes:
        name: as the user gave it.
        timm_name: timm's architecture and weights tag, also the name of the cached weights file.
        patch_size: pixels per cell of the last feature map, in both directions.
        width: channels of the last feature map.
        prefix_tokens: class and register tokens in front of the patch tokens.
        mean: of RGB in [0, 1].
        std: of RGB in [0, 1].
        licence: of the weights, as timm states it; `unknown` where it does not.
        is_transformer: whether it is a plain transformer, with one grid for all blocks.
    """

    name: str
    timm_name: str
    patch_size: int
    width: int
    prefix_tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str
    is_transformer: bool


def registry_names() -> list[str]:
    """Return the short names, families together."""
    return list(_SHORT_NAMES)


@lru_cache(maxsize=64)
def find_backbone(name: str) -> BackboneRecord:
    """Return the record of a short name or of any timm name, with or without weights tag.

    Raises:
        ConfigError: if neither the registry nor timm has the name, or the network gives no
            feature map; names the nearest valid ones.
    """
    timm_name = _timm_name(name)
    pretrained = pretrained_config(timm_name)
    network = build_network(timm_name, device="meta")
    levels = getattr(network, "feature_info", None)
    if not levels or not hasattr(network, "forward_intermediates"):
        raise ConfigError(f"backbone '{name}' gives no feature maps in timm; choose another one")
    if len(pretrained.mean) != 3 or len(pretrained.std) != 3:
        raise ConfigError(f"backbone '{name}' does not take RGB images; choose another one")
    prefix_tokens = getattr(network, "num_prefix_tokens", None)
    return BackboneRecord(
        name=name,
        timm_name=timm_name,
        patch_size=int(levels[-1]["reduction"]),
        width=int(levels[-1]["num_chs"]),
        prefix_tokens=int(prefix_tokens or 0),
        mean=tuple(pretrained.mean),
        std=tuple(pretrained.std),
        licence=pretrained.license or "unknown",
        is_transformer=prefix_tokens is not None,
    )


def pretrained_config(timm_name: str) -> Any:
    """Return timm's own description of the weights; its defaults where it has none."""
    from timm.models import PretrainedCfg, get_pretrained_cfg

    return get_pretrained_cfg(timm_name) or PretrainedCfg()


def build_network(timm_name: str, *, device: str = "cpu") -> nn.Module:
    """Build a network without classifier and without weights, for any image size it can take.

    Args:
        timm_name: from a record.
        device: `meta` costs neither memory nor initialisation.
    """
    import timm

    with torch.device(device):
        try:
            network = timm.create_model(timm_name, num_classes=0, dynamic_img_size=True)
        except TypeError:  # networks without position grid don't know the option
            network = timm.create_model(timm_name, num_classes=0)
    return network


def random_state(record: BackboneRecord) -> dict[str, Tensor]:
    """Return the network's own initialisation under a fixed seed; for tests.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)
        return dict(build_network(record.timm_name).state_dict())


def fit_state(state: dict[str, Any], record: BackboneRecord, source: str) -> dict[str, Tensor]:
    """Return the tensors under the names of the record's network, every one of them.

    Weights of a classifier are dropped. Meta's own files of DINOv2 and DINOv3 are renamed by
    timm's rules, which are tried only if the names differ.

    Raises:
        CheckpointError: if a tensor is missing, left over, or has another shape.
    """
    network = build_network(record.timm_name, device="meta")
    expected = network.state_dict()
    classifiers = pretrained_config(record.timm_name).classifier or ()
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    prefixes = tuple(f"{head}." for head in heads)
    state = {k: v for k, v in state.items() if k in expected or not k.startswith(prefixes)}
    if state.keys() != expected.keys():
        state = _rename(state, network, record)
    problem = _misfit(state, expected)
    if problem:
        raise CheckpointError(f"weights {source} do not fit backbone '{record.name}': {problem}")
    return state


def _timm_name(name: str) -> str:
    import timm

    timm_name = _SHORT_NAMES.get(name, name)
    if not timm.is_model(timm_name):
        raise ConfigError(_unknown(name, [*registry_names(), *timm.list_models()]))
    try:
        pretrained = pretrained_config(timm_name)
    except RuntimeError as error:  # the architecture exists, the tag does not
        tagged = timm.list_models(timm_name.split(".")[0], include_tags=True)
        raise ConfigError(_unknown(name, tagged)) from error
    # Without a tag timm takes its default one; the cached file is named after what was taken.
    architecture = timm_name.split(".")[0]
    return f"{architecture}.{pretrained.tag}" if pretrained.tag else architecture


def _unknown(name: str, valid: list[str]) -> str:
    nearest = difflib.get_close_matches(name, valid, n=4, cutoff=0.5) or registry_names()
    return f"backbone '{name}' is not known; nearest names: {', '.join(nearest)}"


def _rename(state: dict[str, Any], network: nn.Module, record: BackboneRecord) -> dict[str, Any]:
    # timm resamples patch embeddings and position grids of another size without a word: those are
    # weights of another network. Files may differ by the prefix tokens' positions only.
    expected = network.state_dict()
    for key, slack in (("patch_embed.proj.weight", 0), ("pos_embed", record.prefix_tokens)):
        ours, theirs = expected.get(key), state.get(key)
        if ours is None or theirs is None:
            continue
        if theirs.ndim != ours.ndim or theirs.shape[2:] != ours.shape[2:]:
            return state
        if abs(theirs.shape[1] - ours.shape[1]) > slack:
            return state
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        return dict(convert(state, network)) if convert else state
    except (AttributeError, KeyError, RuntimeError, ValueError):
        return state  # not a layout that timm knows; the caller says what does not fit


def _misfit(state: dict[str, Any], expected: dict[str, Tensor]) -> str:
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    reshaped = [
        f"{key} {tuple(getattr(state[key], 'shape', ()))} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and getattr(state[key], "shape", None) != tensor.shape
    ]
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", reshaped))
    return "; ".join(f"{len(keys)} {kind} (first: {keys[0]})" for kind, keys in kinds if keys)

"""What the names, shapes and settings in a checkpoint of the original STEGO code mean.

The tensors decide what the model is; the settings that are stored with them, as a tree of OmegaConf
nodes or as plain dicts, must agree. Source: the names in the released files.

Legend: C backbone width, K code channels, N clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stego_core.errors import CheckpointError
from stego_core.model.safe_pickle import Record

BACKBONE_PREFIX = "net.model."
# Width and patch size to the original's name of the network and ours.
ARCHITECTURES = {
    (384, 8): ("vit_small", "dino-vits8"),
    (384, 16): ("vit_small", "dino-vits16"),
    (768, 8): ("vit_base", "dino-vitb8"),
    (768, 16): ("vit_base", "dino-vitb16"),
}
_FEATURE_TYPES = ("feat", "KK")
_PATCHES = f"{BACKBONE_PREFIX}patch_embed.proj.weight"
_LINEAR_BRANCH, _NONLINEAR_BRANCH = "net.cluster1.0.", "net.cluster2."
_CLUSTERS, _PROBE = "cluster_probe.clusters", "linear_probe."
_SETTINGS = (
    *("arch", "model_type", "dino_patch_size", "dino_feat_type"),
    *("projection_type", "dim", "continuous", "extra_clusters"),
)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """What the tensors of a checkpoint say the model is.

    Attributes:
        width: C.
        patch_size: pixels.
        dim: K.
        num_clusters: N.
        num_classes: of the linear probe; 0 without one.
        is_nonlinear: whether the head has its second branch.
        names: of head and probes, in the checkpoint to ours.
    """

    width: int
    patch_size: int
    dim: int
    num_clusters: int
    num_classes: int
    is_nonlinear: bool
    names: dict[str, str]

    @property
    def backbone(self) -> str:
        """Return the registry's name of the backbone."""
        return ARCHITECTURES[self.width, self.patch_size][1]


def read_layout(shapes: Mapping[str, Shape]) -> Layout:
    """Return the layout of a state dict.

    Args:
        shapes: of every tensor.

    Raises:
        CheckpointError: one line for each tensor that is missing, unknown or of another shape.
    """
    axes = {_PATCHES: 4, f"{_LINEAR_BRANCH}weight": 4, _CLUSTERS: 2}
    problems = [
        f"{name} is missing or hasn't {count} axes: only ViT checkpoints of STEGO with a head and "
        "clusters can be imported"
        for name, count in axes.items()
        if len(shapes.get(name, ())) != count
    ]
    if problems:
        raise CheckpointError(*problems)
    width, _, patch, _ = shapes[_PATCHES]
    if (width, patch) not in ARCHITECTURES:
        raise CheckpointError(
            f"a backbone of width {width} and patch size {patch} is none of DINO's ViTs"
        )
    dim, classes = shapes[f"{_LINEAR_BRANCH}weight"][0], shapes.get(f"{_PROBE}weight", (0,))[:1]
    layout = Layout(
        width=width,
        patch_size=patch,
        dim=dim,
        num_clusters=shapes[_CLUSTERS][0],
        num_classes=classes[0] if classes else 0,
        is_nonlinear=any(name.startswith(_NONLINEAR_BRANCH) for name in shapes),
        names=_names(shapes),
    )
    problems = _misshapen(shapes, layout)
    if problems:
        raise CheckpointError(*problems)
    return layout


def _names(shapes: Mapping[str, Shape]) -> dict[str, str]:
    prefixes = {
        _LINEAR_BRANCH: "head.linear.",
        _NONLINEAR_BRANCH: "head.nonlinear.",
        _PROBE: "linear.",
    }
    names = {
        name: ours + name.removeprefix(theirs)
        for name in shapes
        for theirs, ours in prefixes.items()
        if name.startswith(theirs)
    }
    return {**names, _CLUSTERS: "clusters"}


def _misshapen(shapes: Mapping[str, Shape], layout: Layout) -> list[str]:
    """List tensors of head and probes that are missing, unknown or of another shape."""
    dim, width, classes = layout.dim, layout.width, layout.num_classes
    expected: dict[str, Shape] = {
        f"{_LINEAR_BRANCH}weight": (dim, width, 1, 1),
        f"{_LINEAR_BRANCH}bias": (dim,),
        _CLUSTERS: (layout.num_clusters, dim),
    }
    if layout.is_nonlinear:
        expected |= {
            f"{_NONLINEAR_BRANCH}0.weight": (width, width, 1, 1),
            f"{_NONLINEAR_BRANCH}0.bias": (width,),
            f"{_NONLINEAR_BRANCH}2.weight": (dim, width, 1, 1),
            f"{_NONLINEAR_BRANCH}2.bias": (dim,),
        }
    if any(name.startswith(_PROBE) for name in shapes):
        expected |= {f"{_PROBE}weight": (classes, dim, 1, 1), f"{_PROBE}bias": (classes,)}
    problems = [
        f"{name} has shape {shapes[name]} instead of {shape}"
        if name in shapes
        else f"{name} is missing"
        for name, shape in expected.items()
        if shapes.get(name) != shape
    ]
    heads = {n for n in shapes if n.startswith("net.") and not n.startswith(BACKBONE_PREFIX)}
    unknown = sorted((heads | layout.names.keys()) - expected.keys())
    if unknown:
        problems.append(f"{len(unknown)} unknown tensors of head or probe: {unknown[0][:60]!a}")
    return problems


def disagreements(layout: Layout, settings: Mapping[str, Any]) -> list[str]:
    """List settings that say something else than the tensors; one that is not stored says nothing.

    Args:
        layout: from `read_layout`.
        settings: from `read_settings`.
    """
    classes, extra = layout.num_classes, settings.get("extra_clusters", 0)
    expected: dict[str, Any] = {
        "arch": "dino",
        "model_type": ARCHITECTURES[layout.width, layout.patch_size][0],
        "dino_patch_size": layout.patch_size,
        "n_classes": classes or layout.num_clusters,
    }
    if settings.get("continuous", True):  # else K is the number of classes, whatever `dim` says
        expected["dim"] = layout.dim
    if classes:
        expected["extra_clusters"] = layout.num_clusters - classes
    elif extra in range(1, layout.num_clusters):
        expected["n_classes"] = layout.num_clusters - extra
    problems = [
        f"its settings say {name} = {settings[name]!a}, the tensors {value!a}"
        for name, value in expected.items()
        if name in settings and settings[name] != value
    ]
    branches = "nonlinear" if layout.is_nonlinear else "linear"
    kind = settings.get("projection_type", branches)
    # The original takes any other word for the linear branch alone, and null for no head.
    if kind is None or (kind == "nonlinear") != layout.is_nonlinear:
        problems.append(f"its settings say projection_type = {kind!a}, the tensors {branches!a}")
    feature = settings.get("dino_feat_type", "feat")
    if feature not in _FEATURE_TYPES:
        problems.append(f"its settings say dino_feat_type = {feature!a}; known are feat and KK")
    return problems


def read_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that say what the model is, where they are stored as plain values.

    Args:
        content: of the checkpoint; `hyper_parameters.cfg` may be a dict or a record of OmegaConf.

    Returns:
        Strings, whole numbers, truth values or None.
    """
    stored = _fields(content.get("hyper_parameters"))
    config = _fields(stored.get("cfg"))
    found = {name: _value(config[name]) for name in _SETTINGS if name in config}
    if "n_classes" in stored:
        found["n_classes"] = _value(stored["n_classes"])
    return {name: value for name, value in found.items() if _is_plain(value)}


def _fields(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Record):  # OmegaConf keeps a container's entries in this attribute
        value = value.state.get("_content") if isinstance(value.state, dict) else None
    return value if isinstance(value, dict) else {}


def _value(node: Any) -> Any:
    if isinstance(node, Record) and isinstance(node.state, dict):
        return node.state.get("_val")
    return node


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):  # neither a reference to another setting nor OmegaConf's "missing"
        return len(value) < 100 and not value.startswith("${") and value != "???"
    return value is None or (isinstance(value, int) and abs(value) < 2**31)

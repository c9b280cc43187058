"""Import of checkpoints that the original STEGO code released (PyTorch Lightning files).

Their tensors become a model folder of this package, with the backbone's weights beside the head.
What their names mean is in `stego_core.model.lightning_layout`.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from stego_core.config.load import dump_toml
from stego_core.config.method import HeadConfig
from stego_core.config.schema import BackboneConfig, ImportJob
from stego_core.errors import CheckpointError
from stego_core.model.lightning_layout import (
    BACKBONE_PREFIX,
    disagreements,
    read_layout,
    read_settings,
)
from stego_core.model.registry import find_backbone, fit_state
from stego_core.model.safe_pickle import TensorSpec
from stego_core.model.segmenter import model_card, save_segmenter
from stego_core.model.torch_archive import TorchArchive, open_archive
from stego_core.model.weights import ResolvedWeights
from stego_core.storage import fs
from stego_core.storage.lease import hold
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)

BACKBONE_FILE = "backbone.safetensors"


@dataclass(frozen=True, slots=True)
class LightningModel:
    """What a checkpoint holds, with tensors not read yet.

    Attributes:
        backbone: name, kind of feature and where the weights will be.
        head: kind and channels; whitening and smoothing off, as the original has neither.
        tensors: of head, clusters and linear probe, by their names in our model file.
        backbone_tensors: by timm's names.
        num_clusters: N.
        num_classes: of the linear probe; 0 without one.
        ignored: names that were left out.
    """

    backbone: BackboneConfig
    head: HeadConfig
    tensors: dict[str, TensorSpec]
    backbone_tensors: dict[str, TensorSpec]
    num_clusters: int
    num_classes: int
    ignored: list[str]

    def lines(self) -> list[str]:
        """Return what it is, one line each."""
        ignored = sorted({name.partition(".")[0] for name in self.ignored})
        return [
            f"backbone: {self.backbone.name}, feature {self.backbone.feature}, "
            f"{len(self.backbone_tensors)} tensors",
            f"head: {self.head.kind}, code of {self.head.dim} channels",
            f"clusters: {self.num_clusters}; classes of the linear probe: {self.num_classes}",
            f"not used: {', '.join(ignored) or 'nothing'}",
        ]


def plan_import(job: ImportJob) -> list[str]:
    """Return what the checkpoint holds and where it would go, without touching anything."""
    with open_archive(job.checkpoint) as archive:
        found = read_model(archive)
    return [f"checkpoint: {job.checkpoint}", *found.lines(), f"output: {job.out}"]


def import_checkpoint(job: ImportJob, run: RunDirectory) -> None:
    """Write the model of `job.checkpoint` into the run directory.

    Raises:
        InputError: if the checkpoint can't be read.
        CheckpointError: if it is damaged, hostile or of another layout, or if the run directory
            holds a model of other origin, or another job holds it.
    """
    folder = run.path("model")
    if fs.exists(fs.join(folder, "model.json")) and not fs.exists(fs.join(folder, BACKBONE_FILE)):
        raise CheckpointError(f"{job.out} holds a model that was trained there: give another --out")
    with open_archive(job.checkpoint) as archive:
        found = read_model(archive)
        tensors = {name: _floats(archive, name, s) for name, s in found.tensors.items()}
        state = {name: _floats(archive, name, s) for name, s in found.backbone_tensors.items()}
    if found.num_classes:
        tensors["linear.weight"] = tensors["linear.weight"].flatten(1)
    source = f"checkpoint {job.checkpoint.rpartition('/')[2]}"
    data = safetensors.torch.save(state, {"source": source})
    card = model_card(
        weights=ResolvedWeights(None, source, hashlib.sha256(data).hexdigest()),
        config=found.backbone,
        head=found.head,
        cluster_names=[f"cluster {number}" for number in range(found.num_clusters)],
        num_classes=found.num_classes,
        class_names=[],
    )
    with hold(job.out):
        fs.write_bytes(run.path("config.resolved.toml"), dump_toml(job).encode())
        fs.write_bytes(fs.join(folder, BACKBONE_FILE), data)
        save_segmenter(folder, tensors, card)
    for line in found.lines():
        logger.info("%s", line)
    logger.info("model: %s", folder)


def read_model(archive: TorchArchive) -> LightningModel:
    """Return what a checkpoint holds; reads no tensor.

    Raises:
        CheckpointError: one line for each thing that is missing, or that disagrees with another.
    """
    content = archive.content
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(_is_tensor(*item) for item in state.items()):
        raise CheckpointError("it has no state_dict of tensors: not a Lightning checkpoint")
    settings = read_settings(content)
    layout = read_layout({name: spec.shape for name, spec in state.items()})
    problems = disagreements(layout, settings)
    if problems:
        raise CheckpointError(*problems)
    is_key = settings.get("dino_feat_type") == "KK"
    backbone = BackboneConfig(
        name=layout.backbone,
        weights=BACKBONE_FILE,
        feature="key" if is_key else "last",
        positions="original",
    )
    kind: Literal["nonlinear", "linear"] = "nonlinear" if layout.is_nonlinear else "linear"
    # Tensors without memory: they fit or don't before anything is read.
    fakes = {
        name.removeprefix(BACKBONE_PREFIX): torch.empty(spec.shape, device="meta")
        for name, spec in state.items()
        if name.startswith(BACKBONE_PREFIX)
    }
    fitted = fit_state(fakes, find_backbone(backbone.name), "in the checkpoint")
    network = {name: f"{BACKBONE_PREFIX}{name}" for name in fitted}
    used = {*layout.names, *network.values()}
    return LightningModel(
        backbone=backbone,
        head=HeadConfig(kind=kind, dim=layout.dim, whiten=0, smooth=0.0),
        tensors={new: state[old] for old, new in layout.names.items()},
        backbone_tensors={new: state[old] for new, old in network.items()},
        num_clusters=layout.num_clusters,
        num_classes=layout.num_classes,
        ignored=[name for name in state if name not in used],
    )


def _is_tensor(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, TensorSpec)


def _floats(archive: TorchArchive, name: str, spec: TensorSpec) -> Tensor:
    tensor = archive.read(spec).float()
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} holds numbers that are not finite")
    return tensor

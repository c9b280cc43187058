"""Checkpoints of the layout that the original STEGO code writes, and archives made by hand."""

from __future__ import annotations

import collections
import sys
import types
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stego_core.model.registry import find_backbone, random_state


def module_with(name: str, *classes: str) -> types.ModuleType:
    module = types.ModuleType(name)
    for class_name in classes:
        setattr(module, class_name, type(class_name, (), {"__module__": name}))
    return module


@contextmanager
def foreign_packages():
    """OmegaConf's and Lightning's classes by name only: there to be pickled, gone afterwards."""
    modules = [
        module_with("omegaconf"),
        module_with("omegaconf.dictconfig", "DictConfig"),
        module_with("omegaconf.listconfig", "ListConfig"),
        module_with("omegaconf.nodes", "AnyNode"),
        module_with("omegaconf.base", "ContainerMetadata", "Metadata"),
        module_with("pytorch_lightning"),
        module_with("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ]
    named = {module.__name__: module for module in modules}
    assert not named.keys() & sys.modules.keys()
    sys.modules.update(named)
    try:
        yield named
    finally:
        for name in named:
            del sys.modules[name]


def omega_tree(values: dict[str, Any], modules: dict[str, types.ModuleType]) -> Any:
    """A DictConfig with the attributes that OmegaConf 2.1 pickles: nodes, parents, type notes."""

    def made(module: str, name: str, **attributes: Any) -> Any:
        instance = getattr(modules[module], name)()
        instance.__dict__.update(attributes)
        return instance

    def notes(name: str, kind: Any) -> Any:
        shared = {"ref_type": Any, "object_type": kind, "optional": True, "key": None, "flags": {}}
        factory = collections.defaultdict(dict)
        return made("omegaconf.base", name, **shared, flags_root=False, resolver_cache=factory)

    tree = made("omegaconf.dictconfig", "DictConfig", _parent=None)
    tree._metadata = notes("ContainerMetadata", dict)
    tree._metadata.element_type = tree._metadata.key_type = Any
    tree._content = {
        key: made("omegaconf.nodes", "AnyNode", _val=value, _parent=tree, _metadata=notes(
            "Metadata", None if value is None else type(value)))
        for key, value in values.items()
    }  # fmt: skip
    names = made("omegaconf.listconfig", "ListConfig", _parent=tree, _content=[])
    tree._content["azureml_names"] = names
    return tree


CONFIG = {
    "arch": "dino",
    "model_type": "vit_small",
    "dino_patch_size": 16,
    "dino_feat_type": "feat",
    "projection_type": "nonlinear",
    "dim": 6,
    "continuous": True,
    "extra_clusters": 0,
    "pretrained_weights": None,
    "lr": 5e-4,
    "dropout": True,
}


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def state_dict(
    backbone: str, *, dim=6, classes=5, clusters=5, nonlinear=True, linear=True
) -> collections.OrderedDict[str, torch.Tensor]:
    """Tensors under the original's names; the backbone's are random but always the same."""
    record = find_backbone(backbone)
    width, state = record.width, collections.OrderedDict()
    for name, tensor in random_state(record).items():
        state[f"net.model.{name}"] = tensor
    state["net.cluster1.0.weight"] = drawn(dim, width, 1, 1, seed=1)
    state["net.cluster1.0.bias"] = drawn(dim, seed=2)
    if nonlinear:
        state["net.cluster2.0.weight"] = drawn(width, width, 1, 1, seed=3)
        state["net.cluster2.0.bias"] = drawn(width, seed=4)
        state["net.cluster2.2.weight"] = drawn(dim, width, 1, 1, seed=5)
        state["net.cluster2.2.bias"] = drawn(dim, seed=6)
    state["train_cluster_probe.clusters"] = drawn(clusters, dim, seed=7)
    state["cluster_probe.clusters"] = torch.nn.Parameter(3 * drawn(clusters, dim, seed=8))
    if linear:
        state["linear_probe.weight"] = drawn(classes, dim, 1, 1, seed=9)
        state["linear_probe.bias"] = drawn(classes, seed=10)
    state["decoder.weight"] = drawn(width, dim, 1, 1, seed=11)
    state["decoder.bias"] = drawn(width, seed=12)
    state._metadata = {"": {"version": 1}}  # as torch.nn.Module.state_dict leaves it
    return state


def save_checkpoint(path: Path, state: dict[str, torch.Tensor], *, classes=5, **config) -> Path:
    """Write a file as Lightning did, with the configuration as OmegaConf's objects."""
    with foreign_packages() as modules:
        callback = modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint
        content = {
            "epoch": 3,
            "global_step": 5000,
            "pytorch-lightning_version": "1.5.10",
            "state_dict": state,
            "callbacks": {callback: {"best_model_score": torch.tensor(28.2), "best_k_models": {}}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
            "hyper_parameters": {
                "n_classes": classes,
                "cfg": omega_tree(CONFIG | config, modules),
            },
        }
        torch.save(content, path)
    return path


def write_archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """Write an archive of torch.save's layout around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/version", "3\n")
        for key, data in (storages or {}).items():
            archive.writestr(f"model/data/{key}", data)
    return path

"""The training state as tensors and JSON: what a killed run continues from."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from stego_core.config.method import TrainConfig
from stego_core.errors import CheckpointError
from stego_core.model.checkpoint import load_tensors, save_tensors
from stego_core.storage import fs
from stego_core.training.step import Trainable


class Optimizers:
    """The method's three Adams: head, cluster probe, linear probe.

    Detached codes keep the probes' losses away from the head, so one backward serves all.
    """

    def __init__(self, model: Trainable, config: TrainConfig) -> None:
        self._parts: dict[str, tuple[nn.Module, Adam]] = {
            "head": (model.head, Adam(model.head.parameters(), lr=config.head_lr)),
            "cluster_probe": (
                model.cluster_probe,
                Adam(model.cluster_probe.parameters(), lr=config.probe_lr),
            ),
        }
        if model.linear_probe is not None:
            probe = Adam(model.linear_probe.parameters(), lr=config.probe_lr)
            self._parts["linear_probe"] = (model.linear_probe, probe)
        if model.decoder is not None:
            decoder = Adam(model.decoder.parameters(), lr=config.head_lr)
            self._parts["decoder"] = (model.decoder, decoder)

    def reset_probes(self) -> None:
        """Forget the moments of both probes, as if their optimisers were new."""
        for part in ("cluster_probe", "linear_probe"):
            if part in self._parts:
                self._parts[part][1].state.clear()

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for _, optimizer in self._parts.values():
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Apply the gradients."""
        for _, optimizer in self._parts.values():
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments as `<part>.<parameter>.<moment>`."""
        out: dict[str, Tensor] = {}
        for part, (module, optimizer) in self._parts.items():
            for name, parameter in module.named_parameters():
                for moment, value in optimizer.state.get(parameter, {}).items():
                    out[f"{part}.{name}.{moment}"] = torch.as_tensor(value)
        return out

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over moments that `tensors` returned."""
        for part, (module, optimizer) in self._parts.items():
            for name, parameter in module.named_parameters():
                prefix = f"{part}.{name}."
                moments = {
                    key.removeprefix(prefix): value.clone()
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
                if moments:
                    # Beside their parameter, but for the count, which Adam keeps on the CPU.
                    optimizer.state[parameter] = {
                        moment: value if moment == "step" else value.to(parameter.device)
                        for moment, value in moments.items()
                    }


def save_state(
    folder_uri: str, model: Trainable, optimizers: Optimizers, record: dict[str, Any]
) -> None:
    """Write `state.safetensors` and `state.json`."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"optimizer.{k}": v for k, v in optimizers.tensors().items()}
    save_tensors(folder_uri, "state", tensors, record)


def find_checkpoint(starts_uri: str) -> str | None:
    """Return the newest checkpoint that is whole, of all starts of one training; None without.

    A kill may leave a checkpoint half copied. Both files are read to find out: safetensors knows
    its own length.

    Args:
        starts_uri: folder that holds `<start>/step-<n>/`.

    Raises:
        OSError: if a store is in trouble: without the newest, work would be done again.
    """
    folders = [
        (step, fs.join(starts_uri, start, step))
        for start in fs.list_names(starts_uri)
        for step in fs.list_names(fs.join(starts_uri, start))
        if step.startswith("step-")
    ]
    for _, folder in sorted(folders, reverse=True):
        for name in ("model", "state"):
            with suppress(CheckpointError):
                load_tensors(folder, name)
                return folder
    return None


def load_state(folder_uri: str, model: Trainable, optimizers: Optimizers) -> dict[str, Any]:
    """Take over a state that `save_state` wrote; return its record.

    Raises:
        CheckpointError: if it is damaged or of other settings.
    """
    tensors, record = load_tensors(folder_uri, "state")
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        parts.setdefault(kind, {})[name] = value
    try:
        model.load_state_dict(parts["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{folder_uri} is a state of other settings") from error
    optimizers.load(parts["optimizer"])
    return record

"""Models and training states as files: safetensors for tensors, JSON for the rest; no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from stego_core.errors import CheckpointError
from stego_core.storage import fs
from stego_core.storage.retry import is_passing

MODEL_VERSION = 1


def save_tensors(folder_uri: str, name: str, tensors: Mapping[str, Tensor], card: Any) -> None:
    """Write `<name>.safetensors` and, last, `<name>.json`: a reader that sees one sees both.

    Args:
        folder_uri: where the two files go.
        name: `model` or `state`.
        tensors: of any device; keys are kept.
        card: what is not a tensor; JSON-able.
    """
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    data = safetensors.torch.save(plain)
    fs.write_bytes(fs.join(folder_uri, f"{name}.safetensors"), data)
    text = json.dumps(card, indent=2, sort_keys=True) + "\n"
    fs.write_bytes(fs.join(folder_uri, f"{name}.json"), text.encode())


def load_tensors(folder_uri: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        CheckpointError: if the files are missing, damaged or of another kind.
        OSError: if a store is in trouble: they may be whole.
    """
    try:
        card = json.loads(fs.read_bytes(fs.join(folder_uri, f"{name}.json")))
        tensors = safetensors.torch.load(fs.read_bytes(fs.join(folder_uri, f"{name}.safetensors")))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder_uri} holds no {name}.safetensors and .json") from error
    except (ValueError, RecursionError, safetensors.SafetensorError, OSError) as error:
        if isinstance(error, OSError) and not fs.is_local(folder_uri) and is_passing(error):
            raise
        raise CheckpointError(f"{folder_uri}: {name} can't be read ({error})") from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{folder_uri}/{name}.json is not a JSON object")
    return tensors, card


def find_model(uri: str) -> str:
    """Return the folder with the model files of a run directory or checkpoint folder.

    Raises:
        CheckpointError: if neither holds a model; a training state alone is named as such.
    """
    for folder in (uri, fs.join(uri, "model")):
        if fs.exists(fs.join(folder, "model.json")):
            return folder
    if any(fs.exists(fs.join(uri, f"state.{kind}")) for kind in ("json", "safetensors")):
        run = uri.rpartition("/checkpoints/")[0]
        raise CheckpointError(
            f"{uri} holds a state that a training continues from, not a model: give the run "
            f"directory{f', {run}' if run else ''}"
        )
    raise CheckpointError(f"{uri} holds no trained model; train one with jobs/train.py --out {uri}")

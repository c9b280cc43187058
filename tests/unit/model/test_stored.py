"""A stored backbone gives the bits that the backbone gave, and runs it once for the same pixels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from stego_core.config.method import HeadConfig
from stego_core.config.schema import BackboneConfig
from stego_core.model.backbone import load_backbone
from stego_core.model.head import Head
from stego_core.model.segmenter import Segmenter
from stego_core.model.stored import StoredBackbone
from stego_core.storage import fs

TINY = {"name": "test_vit", "feature": "last", "blocks": []}


def backbone(precision="fp32"):
    return load_backbone(BackboneConfig(name="test_vit", weights="random", precision=precision))


def batch(seed=0, size=2):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, 32, 48, 3), generator=generator, dtype=torch.uint8)
    return backbone().prepare(pixels)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_stored_has_the_bits_of_what_was_computed(tmp_path: Path, precision: str) -> None:
    plain = backbone(precision)(batch())
    first = StoredBackbone(backbone(precision), str(tmp_path), TINY)
    assert torch.equal(first(batch()), plain)
    again = StoredBackbone(backbone(precision), str(tmp_path), TINY)
    assert torch.equal(again(batch()), plain)
    assert (first.take_counts(), again.take_counts()) == ({"kept": 1}, {"read": 1})
    assert again.take_counts() == {}


def test_other_pixels_and_other_company_are_computed(tmp_path: Path) -> None:
    stored = StoredBackbone(backbone(), str(tmp_path), TINY)
    images = batch()
    for seen in (images, images.flip(3), images[:1], images.transpose(2, 3), images):
        stored(seen)
    assert stored.take_counts() == {"kept": 4, "read": 1}


@pytest.mark.parametrize("change", ["precision", "feature", "weights", "processor", "torch"])
def test_another_backbone_does_not_find_these_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    StoredBackbone(backbone(), str(tmp_path), TINY)(batch())
    other, settings = backbone("bf16" if change == "precision" else "fp32"), dict(TINY)
    if change == "feature":
        settings["feature"] = "key"
    if change == "weights":
        other.weights = replace(other.weights, sha256="0" * 64)
    if change == "processor":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "0.1")
    stored = StoredBackbone(other, str(tmp_path), settings)
    stored(batch())
    assert stored.take_counts() == {"kept": 1}


def test_blocks_count_only_where_they_are_read(tmp_path: Path) -> None:
    StoredBackbone(backbone(), str(tmp_path), TINY)(batch())
    same = StoredBackbone(backbone(), str(tmp_path), TINY | {"blocks": [1]})
    same(batch())
    assert same.take_counts() == {"read": 1}


@pytest.mark.parametrize("feature", ["last", "key", "blocks"])
def test_codes_have_the_same_bits_with_and_without_a_store(tmp_path: Path, feature: str) -> None:
    config = BackboneConfig(name="test_vit", weights="random", feature=feature, blocks=(0, -1))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, 32, 48, 3), generator=generator, dtype=torch.uint8)
    codes = []
    for store in (None, tmp_path, tmp_path):
        found = load_backbone(config)
        head = HeadConfig(kind="nonlinear", dim=4, whiten=0)
        tensors = {f"head.{k}": v for k, v in seeded_head(found.width, head).items()}
        tensors["clusters"] = torch.eye(4)
        segmenter = Segmenter(found, tensors, {"head": asdict(head)})
        if store is not None:
            settings = {"name": "test_vit", "feature": feature, "blocks": [0, -1]}
            segmenter.add_module("backbone", StoredBackbone(found, str(store), settings))
        codes.append(torch.cat([part.flatten() for part in segmenter.encode(pixels, flip=True)]))
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("operation", ["read_if_exists", "write_bytes"])
def test_a_store_that_fails_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    calls = []

    def fail(*args: object) -> None:
        calls.append(args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fs, operation, fail)
    stored = StoredBackbone(backbone(), str(tmp_path), TINY)
    assert torch.equal(stored(batch()), backbone()(batch()))
    stored(batch(1))
    assert len(calls) == 1
    assert stored.take_counts() == {"computed": 2}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"not a tensor at all",
        lambda data: safetensors.torch.save({"features": torch.zeros(2, 64, 2, 2)}),
        lambda data: safetensors.torch.save({"others": torch.zeros(2, 64, 2, 3)}),
        lambda data: safetensors.torch.save({"features": torch.zeros(2, 64, 2, 3).double()}),
    ],
)
def test_a_damaged_file_is_computed_and_written_again(tmp_path: Path, damage) -> None:
    stored = StoredBackbone(backbone(), str(tmp_path), TINY)
    expected = stored(batch())
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    assert expected.shape == (2, 64, 2, 3)
    path.write_bytes(damage(whole))
    assert torch.equal(stored(batch()), expected)
    assert stored.take_counts() == {"kept": 2}
    assert path.read_bytes() == whole


def test_passes_of_several_threads_are_all_counted(tmp_path: Path) -> None:
    stored = StoredBackbone(backbone(), str(tmp_path), TINY)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(stored, [batch(seed) for seed in range(4)]))
        list(pool.map(stored, [batch(seed) for seed in range(4)] * 2))
    assert stored.take_counts() == {"kept": 4, "read": 8}


def seeded_head(width: int, config: HeadConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return Head(width, config).state_dict()

"""A stored backbone gives the bits that the backbone gave, and runs it once for the same pixels."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from stego_core.config.schema import BackboneConfig
from stego_core.model.backbone import load_backbone
from stego_core.model.stored import StoredBackbone

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
    assert (first.take_counts(), again.take_counts()) == ({"computed": 1}, {"read": 1})
    assert again.take_counts() == {}


def test_other_pixels_and_other_company_are_computed(tmp_path: Path) -> None:
    stored = StoredBackbone(backbone(), str(tmp_path), TINY)
    images = batch()
    for seen in (images, images.flip(3), images[:1], images.transpose(2, 3), images):
        stored(seen)
    assert stored.take_counts() == {"computed": 4, "read": 1}


@pytest.mark.parametrize(
    ("precision", "change"), [("fp32", {"feature": "key"}), ("fp32", {"blocks": [1]}), ("bf16", {})]
)
def test_another_backbone_does_not_find_these_features(
    tmp_path: Path, precision: str, change: dict
) -> None:
    StoredBackbone(backbone(), str(tmp_path), TINY)(batch())
    other = StoredBackbone(backbone(precision), str(tmp_path), TINY | change)
    other(batch())
    assert other.take_counts() == {"computed": 1}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"not an array at all",
        lambda data: array_bytes(np.zeros((2, 64, 2, 3), np.float64)),
        lambda data: array_bytes(np.zeros((2, 64, 2, 2), np.float32)),
        lambda data: array_bytes(np.array([{"a": 1}], object), allow_pickle=True),
    ],
)
def test_a_damaged_file_is_computed_and_written_again(tmp_path: Path, damage) -> None:
    stored = StoredBackbone(backbone(), str(tmp_path), TINY)
    expected = stored(batch())
    (path,) = tmp_path.rglob("*.npy")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert torch.equal(stored(batch()), expected)
    assert stored.take_counts() == {"computed": 2}
    assert path.read_bytes() == whole


def test_passes_of_several_threads_are_all_counted(tmp_path: Path) -> None:
    stored = StoredBackbone(backbone(), str(tmp_path), TINY)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(stored, [batch(seed) for seed in range(4)] * 3))
    counts = stored.take_counts()
    assert counts["computed"] + counts["read"] == 12
    assert counts["computed"] >= 4


def array_bytes(array: np.ndarray, *, allow_pickle=False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()

"""Learned positions at another size, against bicubic interpolation written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stego_core.config.backbone import BackboneConfig
from stego_core.errors import ConfigError
from stego_core.model.backbone import Backbone, load_backbone
from stego_core.model.positions import fit_positions


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, as torch has it without antialiasing."""
    a, d = -0.75, abs(distance)
    if d < 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0


def weights(cells: int, learned: int) -> NDArray[np.float64]:
    """Row i: what cell i of the new grid takes of each learned one; DINO's scale, borders held."""
    out = np.zeros((cells, learned))
    for cell in range(cells):
        place = (cell + 0.5) / ((cells + 0.1) / learned) - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            out[cell, min(max(tap, 0), learned - 1)] += cubic(place - tap)
    return out


def load(name: str = "test_vit", **options: str) -> Backbone:
    return load_backbone(BackboneConfig(name=name, weights="random", precision="fp32", **options))


@pytest.mark.parametrize("grid", [(10, 10), (14, 14), (7, 12), (3, 25)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_positions_are_those_of_dino(grid: tuple[int, int], prefix: int) -> None:
    generator = torch.Generator().manual_seed(0)
    positions = torch.randn(1, prefix + 100, 5, generator=generator, dtype=torch.float64)
    found = fit_positions(positions, (10, 10), grid, prefix=prefix)[0]
    learned = positions[0, prefix:].numpy().reshape(10, 10, 5)
    if grid == (10, 10):  # the original leaves them as they are
        expected = learned
    else:
        expected = np.einsum("yi,xj,ijc->yxc", weights(grid[0], 10), weights(grid[1], 10), learned)
    assert torch.equal(found[:prefix], positions[0, :prefix])
    np.testing.assert_allclose(found[prefix:].numpy(), expected.reshape(-1, 5), atol=1e-12)


def test_a_backbone_adds_them_where_the_image_has_another_size() -> None:
    exact, original = load(), load(positions="original")
    images = torch.randn(2, 3, 128, 192, generator=torch.Generator().manual_seed(0))
    network = original._network
    with torch.no_grad():
        embedded = network._pos_embed(network.patch_embed(images))
        plain = network.patch_embed(images).flatten(1, 2)
        fitted = fit_positions(network.pos_embed, (10, 10), (8, 12), prefix=1)
    torch.testing.assert_close(embedded[:, 1:] - plain, fitted[:, 1:].expand(2, -1, -1))
    assert not torch.allclose(exact(images), original(images), atol=1e-4)
    same = torch.randn(1, 3, 160, 160)
    assert torch.equal(exact(same), original(same))


def test_a_network_without_learned_positions_is_refused() -> None:
    with pytest.raises(ConfigError, match="'resnet18' has no learned positions"):
        load("resnet18", positions="original")

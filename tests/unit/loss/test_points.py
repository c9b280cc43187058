from __future__ import annotations

import pytest
import torch

from stego_core.loss.correspondence import sample_points
from stego_core.loss.points import locate, sample_rows

# Both sum four products in float64, in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def drawn(seed, maps=3, sets=3, *, height=5, width=7, samples=4, reach=1.0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(maps, 6, height, width, generator=draw, dtype=dtype)
    coords = torch.rand(sets, samples, samples, 2, generator=draw, dtype=dtype) * 2 - 1
    return values, coords * reach


def fast(maps, coords, which=None):
    return sample_rows(maps, locate(coords, *maps.shape[2:]), which)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("height", "width", "samples"), [(5, 7, 4), (1, 1, 2), (1, 6, 3), (4, 1, 1), (16, 16, 11)]
)
def test_sampling_rows_equals_sampling_points(layout, height, width, samples):
    maps, coords = drawn(0, height=height, width=width, samples=samples)
    expected = sample_points(maps, coords)
    found = fast(maps.contiguous(memory_format=layout), coords)
    assert found.shape == (3, 6, samples, samples)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_single_precision_agrees_within_its_rounding():
    maps, coords = drawn(1, height=16, width=16, samples=11, dtype=torch.float32)
    torch.testing.assert_close(
        fast(maps, coords), sample_points(maps, coords), rtol=1e-4, atol=1e-5
    )


def test_points_on_cells_borders_and_beyond_agree():
    maps, _ = drawn(2)
    line = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5], dtype=torch.float64)
    coords = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).expand(3, -1, -1, -1)
    torch.testing.assert_close(fast(maps, coords), sample_points(maps, coords), **CLOSE)
    corner = fast(maps, torch.ones(3, 1, 1, 2, dtype=torch.float64))
    assert torch.equal(corner[:, :, 0, 0], maps[:, :, -1, -1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_the_maps_agree(layout):
    maps, coords = drawn(3, reach=1.3)
    weight = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    gradients = []
    for sample in (sample_points, fast):
        leaf = maps.clone().contiguous(memory_format=layout).requires_grad_()
        (sample(leaf, coords) * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)
    assert gradients[0].abs().sum() > 0


def test_partners_are_sampled_from_the_maps_that_are_named():
    maps, coords = drawn(4, maps=5, sets=3)
    which = torch.tensor([4, 0, 4])
    torch.testing.assert_close(
        fast(maps, coords, which), sample_points(maps[which], coords), **CLOSE
    )


def test_gradients_reach_a_map_as_often_as_it_is_named_and_no_other():
    maps, coords = drawn(5, maps=5, sets=3)
    which = torch.tensor([4, 0, 4])
    gradients = []
    for sample in (lambda m: sample_points(m[which], coords), lambda m: fast(m, coords, which)):
        leaf = maps.clone().requires_grad_()
        sample(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)
    assert (gradients[1][[1, 2, 3]] == 0).all()


def test_the_weights_of_every_point_sum_to_one_and_name_cells_of_the_grid():
    _, coords = drawn(6, reach=1.5)
    rows = locate(coords, 5, 7)
    torch.testing.assert_close(rows.weight.sum(-1), torch.ones(3, 16, dtype=torch.float64))
    assert (rows.weight >= 0).all()
    assert rows.index.min() >= 0
    assert rows.index.max() < rows.cells == 35

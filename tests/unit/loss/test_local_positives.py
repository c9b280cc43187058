from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import options_reference as reference

from stego_core.errors import ShapeError
from stego_core.loss.local_positives import mix_neighbors


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_mixed_codes_are_those_of_the_loops():
    code, features = drawn(2, 3, 4, 5, seed=0), drawn(2, 6, 4, 5, seed=1) + 0.5
    found = mix_neighbors(code, features)
    for n, i, j in np.ndindex(2, 4, 5):
        expected = reference.mixed_code(code[n].numpy(), features[n].numpy(), i, j)
        np.testing.assert_allclose(found[n, :, i, j].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_noise_shrinks_inside_a_region_and_nothing_crosses_its_border():
    # Two halves of orthogonal features; the code is +1 left and -1 right, with noise.
    features = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    features[:, 0, :, :4], features[:, 1, :, 4:] = 1, 1
    clean = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    clean[..., 4:] = -1
    assert torch.allclose(mix_neighbors(clean, features), clean)
    noise = drawn(1, 1, 8, 8, seed=3)
    left = mix_neighbors(clean + noise, features) - clean
    assert left.square().mean() < 0.3 * noise.square().mean()


def test_equal_features_mix_all_neighbours_equally_also_at_the_edge():
    code = drawn(1, 2, 3, 3, seed=0)
    found = mix_neighbors(code, torch.ones(1, 4, 3, 3, dtype=torch.float64))
    torch.testing.assert_close(found[..., 1, 1], code.mean((2, 3)))
    torch.testing.assert_close(found[..., 0, 0], code[..., :2, :2].mean((2, 3)))


def test_cells_without_features_keep_their_codes():
    code = drawn(1, 2, 3, 3, seed=0)
    assert torch.equal(mix_neighbors(code, torch.zeros(1, 4, 3, 3)), code)


def test_the_gradient_reaches_the_codes_and_not_the_features():
    code = drawn(1, 2, 3, 3, seed=0).requires_grad_()
    features = drawn(1, 4, 3, 3, seed=1).requires_grad_()
    mix_neighbors(code, features).sum().backward()
    assert code.grad is not None
    assert features.grad is None


def test_maps_of_two_grids_are_refused():
    with pytest.raises(ShapeError, match="one grid"):
        mix_neighbors(torch.ones(1, 2, 3, 3), torch.ones(1, 4, 3, 2))

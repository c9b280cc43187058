from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import options_reference as reference

from stego_core.model.kmeans import spherical_kmeans
from stego_core.model.modularity import modularity, raise_modularity


def planted(sizes, *, dim=16, noise=0.15, seed=0):
    """Points around orthogonal directions, and the direction of each."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0][: len(sizes)]
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    noise_ND = noise * torch.randn(len(owner), dim, generator=generator)
    return directions[owner] + noise_ND, owner, directions


def purity(found, owner, count):
    table = np.zeros((count, count), int)
    np.add.at(table, (found.numpy(), owner.numpy()), 1)
    return table.max(1).sum() / len(owner), len(set(table.argmax(1)))


def test_the_modularity_is_that_of_the_loops():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    prototypes = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    expected = reference.modularity(points.numpy(), prototypes.numpy())
    assert modularity(points, prototypes).item() == pytest.approx(expected, abs=1e-12)


def test_the_gradient_is_that_of_the_definition():
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    prototypes = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: modularity(points, m), [prototypes])


def test_the_true_directions_have_a_higher_modularity_than_mixed_ones():
    points, _, directions = planted([40, 40, 40])
    mixed = directions + directions.roll(1, 0)
    assert modularity(points, directions) > modularity(points, mixed)


@pytest.mark.parametrize("seed", range(3))
def test_mixed_prototypes_part_into_planted_clusters_of_unequal_sizes(seed):
    points, owner, directions = planted([400, 200, 100, 100], noise=0.2, seed=seed)
    start = F.normalize(directions + 0.7 * directions.roll(1, 0), dim=1)
    assert purity((points @ start.T).argmax(1), owner, 4)[0] < 0.9
    found = raise_modularity(points, start, seed=seed, steps=150)
    assert modularity(points, found) > modularity(points, start)
    share, distinct = purity((points @ found.T).argmax(1), owner, 4)
    assert share >= 0.97
    assert distinct == 4
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


def test_what_kmeans_plus_plus_chose_is_a_start_that_works():
    points, owner, _ = planted([400, 200, 100, 100])
    start = spherical_kmeans(points, 4, seed=0, max_iterations=0).centroids
    found = raise_modularity(points, start, seed=0, steps=100)
    assert modularity(points, found) > modularity(points, start)
    assert purity((points @ found.T).argmax(1), owner, 4) == (pytest.approx(1, abs=0.03), 4)


def test_the_seed_decides_the_result_and_no_step_changes_nothing():
    points, _, directions = planted([600, 300])
    start = F.normalize(directions + 0.3, dim=1)
    first, second = (raise_modularity(points, start, seed=3, steps=5) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, raise_modularity(points, start, seed=4, steps=5))
    torch.testing.assert_close(raise_modularity(points, start, seed=3, steps=0), start)

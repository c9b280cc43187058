from __future__ import annotations

import numpy as np
import torch
from factories import FakeFeatures, random_maps, ring_neighbors

from stego_core.neighbors.search import NONE
from stego_core.training.matching import match_tokens


def test_mutual_matches_of_neighbours_equal_the_loops():
    maps = random_maps(5, channels=6, height=4, width=3)
    neighbors = np.array([[1, 2], [0, NONE], [4, 3], [NONE, NONE], [3, 0]])
    found = match_tokens(FakeFeatures(maps).read, neighbors, seed=0)
    rows = maps.reshape(5, 6, 12).transpose(0, 2, 1)
    rows = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    expected = []
    for anchor in range(5):
        for other in neighbors[anchor]:
            if other == NONE:
                continue
            for i in range(12):
                j = max(range(12), key=lambda j: rows[anchor, i] @ rows[other, j])
                if max(range(12), key=lambda i: rows[anchor, i] @ rows[other, j]) == i:
                    expected.append((rows[anchor, i], rows[other, j]))
    # All cells are drawn, as there are fewer than the draw asks for.
    first, second = np.array(expected).transpose(1, 0, 2)
    np.testing.assert_allclose(found.first.numpy(), first, atol=1e-5)
    np.testing.assert_allclose(found.second.numpy(), second, atol=1e-5)
    np.testing.assert_allclose(found.differences.numpy(), first - second, atol=1e-5)
    np.testing.assert_allclose(found.tokens.numpy(), rows.reshape(-1, 6), atol=1e-5)


def test_the_seed_alone_decides_and_each_view_is_read_once():
    source = FakeFeatures(random_maps(30, height=20, width=20))
    first = match_tokens(source.read, ring_neighbors(30, 3), seed=1)
    read = [view for views in source.reads for view in views]
    assert sorted(read) == list(range(30))
    again = match_tokens(source.read, ring_neighbors(30, 3), seed=1)
    other = match_tokens(source.read, ring_neighbors(30, 3), seed=2)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.differences, again.differences)
    assert not torch.equal(first.tokens, other.tokens)


def test_a_single_view_has_tokens_but_no_matches():
    source = FakeFeatures(random_maps(1))
    found = match_tokens(source.read, np.array([[NONE, NONE]]), seed=0)
    assert found.tokens.shape == (20, 8)
    assert found.first.shape == found.differences.shape == (0, 8)


def test_smoothing_changes_the_tokens_and_not_the_matches():
    source = FakeFeatures(random_maps(6, height=4, width=4))
    sharp = match_tokens(source.read, ring_neighbors(6), seed=0)
    smooth = match_tokens(source.read, ring_neighbors(6), seed=0, temperature=0.5)
    assert torch.equal(sharp.differences, smooth.differences)
    # Smoothed tokens of a view have come nearer to each other.
    spread = [found.tokens.reshape(6, 16, 8).var(1).sum(1) for found in (sharp, smooth)]
    assert (spread[1] < 0.9 * spread[0]).all()

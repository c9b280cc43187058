from __future__ import annotations

import numpy as np
import torch
from factories import FakeFeatures, random_maps, ring_neighbors

from stego_core.neighbors.search import NONE
from stego_core.training.matching import match_tokens


def test_mutual_matches_of_neighbours_equal_the_loops():
    maps = random_maps(5, channels=6, height=4, width=3)
    neighbors = np.array([[1, 2], [0, NONE], [4, 3], [NONE, NONE], [3, 0]])
    tokens, differences = match_tokens(FakeFeatures(maps).read, neighbors, seed=0)
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
                    expected.append(rows[anchor, i] - rows[other, j])
    # All cells are drawn, as there are fewer than the draw asks for.
    np.testing.assert_allclose(differences.numpy(), np.array(expected), atol=1e-5)
    np.testing.assert_allclose(tokens.numpy(), rows.reshape(-1, 6), atol=1e-5)


def test_the_seed_alone_decides_and_each_view_is_read_once():
    source = FakeFeatures(random_maps(30, height=20, width=20))
    first = match_tokens(source.read, ring_neighbors(30, 3), seed=1)
    read = [view for views in source.reads for view in views]
    assert sorted(read) == list(range(30))
    again = match_tokens(source.read, ring_neighbors(30, 3), seed=1)
    other = match_tokens(source.read, ring_neighbors(30, 3), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_a_single_view_has_tokens_but_no_matches():
    source = FakeFeatures(random_maps(1))
    tokens, differences = match_tokens(source.read, np.array([[NONE, NONE]]), seed=0)
    assert tokens.shape == (20, 8)
    assert differences.shape == (0, 8)


def test_smoothing_changes_the_tokens_and_not_the_matches():
    source = FakeFeatures(random_maps(6, height=4, width=4))
    sharp, differences = match_tokens(source.read, ring_neighbors(6), seed=0)
    smooth, same = match_tokens(source.read, ring_neighbors(6), seed=0, temperature=0.5)
    assert torch.equal(differences, same)
    # Smoothed tokens of a view have come nearer to each other.
    spread = [tokens.reshape(6, 16, 8).var(1).sum(1) for tokens in (sharp, smooth)]
    assert (spread[1] < 0.9 * spread[0]).all()

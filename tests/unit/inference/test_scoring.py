"""Heads judged on stored features: the same label maps as with the backbone, sensible criteria."""

import numpy as np
import pytest
import torch

from stego_core.config.method import HeadConfig
from stego_core.inference.scoring import count_pixels, head_on_features, measure_criteria

VIEWS, GRID, WIDTH = 12, 6, 16


def scene(noise, seed=0):
    """Features of views with three regions each, one direction for a region, and their regions."""
    generator = torch.Generator().manual_seed(seed)
    regions = torch.zeros(VIEWS, GRID, GRID, dtype=torch.long)
    regions[:, GRID // 2 :] = 1
    for view in range(VIEWS):
        left = view % (GRID - 2)
        regions[view, 1:4, left : left + 2] = 2
    maps = 4 * torch.eye(3, WIDTH)[regions].permute(0, 3, 1, 2)
    return maps + noise * torch.randn(maps.shape, generator=generator), regions


def model(clusters):
    head = HeadConfig(kind="none", smooth=0.0)
    tensors = {
        "head.linear.weight": torch.eye(WIDTH)[:, :, None, None],
        "head.linear.bias": torch.zeros(WIDTH),
        "clusters": clusters,
    }
    card = {"head": {"kind": head.kind, "dim": head.dim, "whiten": 0, "smooth": 0.0}}
    return head_on_features(tensors, card, WIDTH)


def criteria(clusters, noise=0.3):
    maps, _ = scene(noise)
    nearest = np.roll(np.arange(VIEWS), 1)
    return measure_criteria(model(clusters), lambda views: maps[views], nearest, seed=0)


def test_the_right_clusters_beat_random_ones_on_agreement_and_margin():
    right = criteria(torch.eye(3, WIDTH))
    # Directions that no region has: noise alone decides which of them is nearest.
    wrong = criteria(torch.eye(WIDTH)[5:8])
    assert right["agreement"] > 0.95
    assert right["agreement"] > wrong["agreement"] + 0.1
    assert right["margin"] > wrong["margin"] + 0.1


def test_stability_tells_structure_from_noise():
    assert criteria(torch.eye(3, WIDTH))["stability"] > 0.95
    assert criteria(torch.eye(3, WIDTH), noise=1000.0)["stability"] < 0.3


def test_a_model_that_puts_everything_in_one_cluster_gets_nothing():
    away = torch.zeros(3, WIDTH)
    away[0, :3], away[1, 3], away[2, 4] = 1, 1, 1
    assert criteria(away)["agreement"] == 0


def test_the_same_seed_gives_the_same_criteria():
    assert criteria(torch.eye(3, WIDTH)) == criteria(torch.eye(3, WIDTH))


def test_views_without_neighbours_have_no_agreement():
    maps, _ = scene(0.1)
    found = measure_criteria(
        model(torch.eye(3, WIDTH)), lambda views: maps[views], np.full(VIEWS, -1), seed=0
    )
    assert found["agreement"] == 0
    assert found["margin"] > 0.5


def test_pixels_are_counted_at_the_size_of_the_labels():
    maps, regions = scene(0.0)
    side = 4 * GRID
    labels = regions[0].repeat_interleave(4, 0).repeat_interleave(4, 1).numpy().astype(np.uint8)
    labels[0, 0] = 255
    counts = count_pixels(model(torch.eye(3, WIDTH)), maps[0].half(), labels)
    assert counts.shape == (255, 3)
    assert counts.sum() == side * side - 1
    # Interpolated borders may fall to either side: all else is on the diagonal.
    assert np.trace(counts[:3]) / counts.sum() == pytest.approx(1, abs=0.1)

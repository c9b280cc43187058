from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import FakeFeatures, random_maps, ring_neighbors

from stego_core.loss.correspondence import correspondence
from stego_core.neighbors.search import NONE
from stego_core.training.calibration import calibrate


def planted(num_views, cosine):
    """Maps of one vector each: all own cosines 1, and `cosine` between any two views."""
    dim = num_views + 1
    vectors = np.sqrt(1 - cosine) * np.eye(num_views, dim)
    vectors[:, -1] = np.sqrt(cosine)
    return np.broadcast_to(vectors[:, :, None, None], (num_views, dim, 3, 3)).copy()


def test_planted_correspondences_are_measured():
    found = calibrate(FakeFeatures(planted(12, 0.3)), ring_neighbors(12), seed=0)
    assert found.means == pytest.approx({"self": 1.0, "knn": 0.3, "random": 0.3}, abs=1e-4)
    assert found.shifts == pytest.approx({"self": 0.3, "knn": 0.3, "random": 0.3}, abs=1e-4)
    assert found.quantiles["knn"] == pytest.approx([0.3] * 5, abs=1e-4)


def test_neighbours_are_told_from_random_pairs():
    # Views 2k and 2k + 1 are neighbours with cosine 0.8; all others have cosine 0.
    maps = np.zeros((20, 40, 2, 2))
    for view in range(20):
        maps[view, view // 2] = np.sqrt(0.8)
        maps[view, 20 + view] = np.sqrt(0.2)
    neighbors = (np.arange(20) ^ 1)[:, None]
    found = calibrate(FakeFeatures(maps), neighbors, seed=0)
    assert found.means["knn"] == pytest.approx(0.8, abs=1e-4)
    assert found.means["random"] < 0.3


def test_three_in_a_hundred_random_pairs_lie_above_the_shift():
    maps = torch.from_numpy(random_maps(90, height=4, width=4)).float()
    found = calibrate(FakeFeatures(maps), ring_neighbors(90), seed=0)
    # The partners are drawn: other random pairs have nearly the same distribution.
    values = correspondence(maps, maps.roll(7, 0))
    above = (values > found.shifts["random"]).float().mean().item()
    assert above == pytest.approx(0.03, abs=0.005)
    assert found.attracted["random"] == pytest.approx(0.03, abs=0.001)
    assert len(set(found.shifts.values())) == 1
    for quantiles in found.quantiles.values():
        assert quantiles == sorted(quantiles)


def test_given_shifts_are_kept_and_the_pairs_above_them_counted():
    given = {"self": 0.5, "knn": 0.2, "random": 0.4}
    found = calibrate(FakeFeatures(planted(12, 0.3)), ring_neighbors(12), seed=0, shifts=given)
    assert found.shifts == given
    assert found.attracted == {"self": 1.0, "knn": 1.0, "random": 0.0}


def test_seed_and_views_alone_decide_the_result():
    maps = random_maps(150, height=3, width=3)
    neighbors = ring_neighbors(150)
    first = calibrate(FakeFeatures(maps), neighbors, seed=1)
    torch.manual_seed(5)
    np.random.seed(5)
    assert calibrate(FakeFeatures(maps), neighbors, seed=1) == first
    assert calibrate(FakeFeatures(maps), neighbors, seed=2) != first


def test_a_view_without_neighbours_stands_for_itself():
    found = calibrate(FakeFeatures(planted(6, 0.2)), np.full((6, 2), NONE), seed=0)
    assert found.means["knn"] == pytest.approx(1.0, abs=1e-4)


def test_a_single_view_can_be_calibrated():
    found = calibrate(FakeFeatures(random_maps(1)), np.array([[NONE]]), seed=0)
    assert found.means["random"] == found.means["self"] == found.means["knn"]
    assert found.quantiles["self"][0] <= found.shifts["self"] <= found.quantiles["self"][4]


def test_large_maps_are_thinned_to_a_grid_that_reaches_their_corners():
    maps = np.zeros((2, 3, 40, 30))
    maps[:, 0] = 1
    maps[:, :, -1, -1] = maps[:, :, 0, 0] = [0, 1, 0]
    found = calibrate(FakeFeatures(maps), ring_neighbors(2, 1), seed=0)
    # 2 of 64 points differ from the other 62.
    assert found.means["self"] == pytest.approx((62**2 + 2**2) / 64**2, abs=1e-4)

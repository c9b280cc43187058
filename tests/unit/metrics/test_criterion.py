"""Criteria without labels, on clusterings whose quality is known."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score, cohen_kappa_score

from stego_core.errors import ShapeError
from stego_core.metrics.criterion import (
    adjusted_rand_index,
    agreement,
    margin,
    mutual_nearest,
    rank_correlation,
    stability,
)


@pytest.mark.parametrize("seed", range(5))
def test_adjusted_rand_index_and_kappa_are_those_of_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    first = generator.integers(0, 6, 300)
    second = np.where(generator.random(300) < 0.5, first, generator.integers(0, 9, 300))
    assert adjusted_rand_index(first, second) == pytest.approx(adjusted_rand_score(first, second))
    assert agreement(first, second) == pytest.approx(cohen_kappa_score(first, second))


def test_numbering_changes_the_agreement_but_not_the_rand_index():
    first = np.array([0, 0, 1, 1, 2, 2])
    renamed = np.array([2, 2, 0, 0, 1, 1])
    assert adjusted_rand_index(first, renamed) == 1
    assert agreement(first, renamed) < 0
    assert agreement(first, first) == 1


def test_a_clustering_that_says_nothing_gets_nothing():
    one, many = np.zeros(20, np.int64), np.arange(20) % 4
    assert adjusted_rand_index(one, one) == 0
    assert adjusted_rand_index(one, many) == 0
    assert agreement(one, one) == 0
    assert agreement(one[:0], one[:0]) == 0


def test_vectors_of_different_length_are_refused():
    with pytest.raises(ShapeError, match="two vectors of one length"):
        agreement(np.zeros(3, np.int64), np.zeros(4, np.int64))


def test_margin_is_what_separates_the_two_nearest_centroids():
    codes = torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, 0.0]])
    # Cosines (1, 0), (0.707, 0.707) and none: the mean of 1, 0 and 0.
    assert margin(codes @ torch.eye(2).T, codes) == pytest.approx(1 / 3, abs=1e-4)
    assert margin(codes[:, :1], codes) == 0


def blobs(generator, centres, noise, count=200):
    which = generator.integers(0, len(centres), count)
    points = centres[which] + noise * generator.normal(size=(count, centres.shape[1]))
    return torch.from_numpy(points).float()


def test_real_clusters_are_stable_and_noise_is_not():
    generator = np.random.default_rng(0)
    centres = 5 * np.eye(8)[:4]
    clear = tuple(blobs(generator, centres, 0.3) for _ in range(2))
    noise = tuple(blobs(generator, 0 * centres, 1.0) for _ in range(2))
    assert stability(clear, 4, seed=0) > 0.95
    assert stability(noise, 4, seed=0) < 0.4


def test_a_half_without_a_code_for_each_cluster_is_not_stable_and_ends_nothing():
    some = torch.eye(5)
    assert stability((some, some), 5, seed=0) == 1
    assert stability((some, some[:4]), 5, seed=0) == 0
    assert stability((some, some * torch.tensor([1.0, 1, 1, 1, 0])), 5, seed=0) == 0
    assert stability((some, some[:0]), 5, seed=0) == 0


def test_mutual_neighbours_are_the_counterparts_and_no_others():
    second = torch.eye(4)
    first = torch.stack([second[2], second[0], (second[0] + 0.2 * second[1]) / 1.02**0.5])
    here, there = mutual_nearest(first, second)
    assert here.tolist() == [0, 1]
    assert there.tolist() == [2, 0]


def test_rank_correlation_is_that_of_scipy_with_ties_and_without_nans():
    generator = np.random.default_rng(1)
    first = generator.integers(0, 8, 40).astype(float)
    second = first + generator.normal(size=40)
    expected = spearmanr(first, second).statistic
    assert rank_correlation([*first, 1.0], [*second, math.nan]) == pytest.approx(expected)
    assert math.isnan(rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]))
    assert math.isnan(rank_correlation([1, 2], [1, 2]))

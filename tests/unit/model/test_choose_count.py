from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import options_reference as reference

from stego_core.errors import ConfigError
from stego_core.model.choose_count import CANDIDATES, choose_count, simplified_silhouette


def planted(count, *, dim=48, per_cluster=80, noise=0.08, seed=0):
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(count, dim, generator=generator), dim=1)
    owner = torch.arange(count).repeat_interleave(per_cluster)
    return directions[owner] + noise * torch.randn(len(owner), dim, generator=generator)


def test_the_silhouette_is_that_of_the_loops():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    centroids = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    expected = reference.silhouette(points.numpy(), centroids.numpy())
    assert simplified_silhouette(points, centroids) == pytest.approx(expected, abs=1e-12)


def test_points_on_their_centroids_score_1_and_points_between_two_score_0():
    assert simplified_silhouette(torch.eye(3), torch.eye(3)) == pytest.approx(1)
    assert simplified_silhouette(torch.ones(2, 2), torch.eye(2)) == pytest.approx(0, abs=1e-6)
    assert simplified_silhouette(torch.ones(4, 2), torch.ones(2, 2)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("count", [3, 6, 11, 16, 23])
def test_the_planted_number_is_chosen(count):
    choice = choose_count(planted(count), seed=0)
    assert choice.count == count
    assert choice.scores[count] == max(choice.scores.values())


def test_every_candidate_with_enough_points_is_in_the_table_and_no_other():
    choice = choose_count(planted(3, per_cluster=30), seed=0)
    assert tuple(choice.scores) == tuple(c for c in CANDIDATES if c <= 9)


def test_the_choice_follows_from_points_and_seed():
    points = planted(4)
    assert choose_count(points, seed=1) == choose_count(points, seed=1)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({2: 1.0, 3: 0.99, 4: 0.96, 6: 0.94}, 4),  # nearly as good as two, and says more
        ({2: 0.7, 3: 0.72, 4: 0.8, 6: 0.76, 8: 0.75}, 6),
        ({2: 0.9, 3: 0.5, 4: 0.5, 6: 0.5}, 2),
        ({2: 0.0, 3: 0.0, 4: -0.1}, 2),  # nothing is agreed on
    ],
)
def test_with_agreement_the_largest_number_near_the_best_is_chosen(scores, expected):
    choice = choose_count(
        planted(3),
        seed=0,
        agreement=lambda centroids: scores[len(centroids)],
        candidates=tuple(scores),
    )
    assert (choice.count, choice.scores) == (expected, scores)


def test_points_without_weight_do_not_count():
    points = torch.cat([planted(3), planted(20, seed=5)])
    weights = torch.cat([torch.ones(240), torch.zeros(1600)])
    centroids = []

    def agreement(found):
        centroids.append(found)
        return -float(len(found))

    choose_count(points, seed=0, weights_N=weights, agreement=agreement, candidates=(3,))
    best = (F.normalize(points[:240], dim=1) @ centroids[-1].T).max(1).values
    assert best.mean() > 0.8


def test_too_few_points_are_refused_in_words():
    with pytest.raises(ConfigError, match=r"clusters\.count"):
        choose_count(torch.eye(19), seed=0)

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


def test_too_few_points_are_refused_in_words():
    with pytest.raises(ConfigError, match=r"clusters\.count"):
        choose_count(torch.eye(19), seed=0)

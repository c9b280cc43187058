from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from reference import stego_reference as reference
from torch import Tensor

from stego_core.errors import ConfigError, ShapeError
from stego_core.model import kmeans
from stego_core.model.kmeans import spherical_kmeans


def planted(*, count: int = 8, each: int = 60, dim: int = 24, noise: float = 0.1) -> tuple:
    draw = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(count, dim, generator=draw), dim=1)
    points = directions.repeat_interleave(each, dim=0)
    points = points + noise * torch.randn(points.shape, generator=draw)
    lengths = 0.1 + 5 * torch.rand(len(points), 1, generator=draw)
    return points * lengths, directions


def noise(rows: int = 400, dim: int = 6) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(4))


def test_planted_directions_are_recovered_whatever_the_lengths_of_points():
    points, directions = planted()
    result = spherical_kmeans(points, 8, seed=0)
    cosines = directions @ result.centroids.T
    assert sorted(cosines.argmax(dim=1).tolist()) == list(range(8))
    assert cosines.max(dim=1).values.min() > 0.99


def test_centroids_are_unit_vectors_and_the_objective_is_their_mean_cosine():
    result = spherical_kmeans(noise(), 7, seed=1, restarts=3)
    torch.testing.assert_close(result.centroids.norm(dim=1), torch.ones(7))
    _, objective = reference.kmeans_step(
        noise().double().numpy(), result.centroids.double().numpy()
    )
    # Single precision.
    assert result.objective == pytest.approx(objective, abs=1e-6)


def test_one_iteration_equals_the_loops():
    start = spherical_kmeans(noise(), 5, seed=2, restarts=1, max_iterations=0)
    moved = spherical_kmeans(noise(), 5, seed=2, restarts=1, max_iterations=1)
    expected, _ = reference.kmeans_step(noise().double().numpy(), start.centroids.double().numpy())
    np.testing.assert_allclose(moved.centroids.numpy(), expected, atol=1e-5)


def test_a_seed_always_gives_the_same_bits_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (spherical_kmeans(noise(), 9, seed=5, restarts=2) for _ in range(2))
    assert first.centroids.equal(second.centroids)
    assert first.objectives == second.objectives
    assert torch.get_rng_state().equal(before)
    assert not spherical_kmeans(noise(), 9, seed=6).centroids.equal(first.centroids)


@pytest.mark.parametrize("seed", range(5))
def test_the_objective_never_falls_from_one_iteration_to_the_next(seed):
    values = [
        spherical_kmeans(noise(), 12, seed=seed, restarts=1, max_iterations=steps).objective
        for steps in range(25)
    ]
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_the_best_start_is_kept_and_fewer_starts_are_the_first_of_many():
    many = spherical_kmeans(noise(), 12, seed=0, restarts=6)
    few = spherical_kmeans(noise(), 12, seed=0, restarts=2)
    assert len(many.objectives) == 6
    assert many.objective == max(many.objectives)
    assert many.objectives[:2] == few.objectives


def test_the_input_is_left_as_it_was():
    points = noise()
    spherical_kmeans(points, 4, seed=0, restarts=1)
    assert points.equal(noise())


def test_small_blocks_give_the_same_centroids(monkeypatch):
    points, _ = planted()
    whole = spherical_kmeans(points, 8, seed=0, restarts=1)
    monkeypatch.setattr(kmeans, "_BLOCK_BYTES", 4 * 8 * 7)
    blocks = spherical_kmeans(points, 8, seed=0, restarts=1)
    # Matrix products of other shapes may round differently.
    torch.testing.assert_close(blocks.centroids, whole.centroids, atol=1e-5, rtol=0)


def test_a_cluster_without_points_moves_to_the_point_that_is_fitted_worst():
    points = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    unit = torch.nn.functional.normalize(points, dim=1)
    start = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    points = kmeans._Points.of(unit, torch.ones(3))
    centroids, objective, revived = kmeans._iterate(points, start, 10)
    assert revived == 1
    torch.testing.assert_close(centroids[1], torch.tensor([0.0, 1.0]))
    assert objective > 0.99


def test_points_that_cancel_out_do_not_make_a_centroid_without_direction():
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    result = spherical_kmeans(points, 1, seed=0)
    torch.testing.assert_close(result.centroids.norm(dim=1), torch.ones(1))


def test_duplicate_points_are_no_obstacle():
    points = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).repeat(20, 1)
    result = spherical_kmeans(points, 4, seed=0)
    assert torch.isfinite(result.centroids).all()
    torch.testing.assert_close(result.centroids.norm(dim=1), torch.ones(4))
    assert result.objective == pytest.approx(1)


def test_zero_vectors_change_nothing():
    points, _ = planted()
    with_zeros = torch.cat([torch.zeros(5, points.shape[1]), points, torch.zeros(5, 24)])
    plain = spherical_kmeans(points, 8, seed=0)
    result = spherical_kmeans(with_zeros, 8, seed=0)
    assert result.centroids.equal(plain.centroids)
    assert result.objective == plain.objective


def test_as_many_points_as_clusters_are_all_centroids():
    points = torch.eye(5)
    result = spherical_kmeans(points, 5, seed=0)
    assert result.objective == pytest.approx(1)


@pytest.mark.parametrize("points", [torch.eye(3), torch.cat([torch.eye(3), torch.zeros(9, 3)])])
def test_fewer_usable_points_than_clusters_is_one_readable_line(points):
    with pytest.raises(
        ConfigError, match=r"3 usable codes for 4 clusters.*clusters\.count"
    ) as info:
        spherical_kmeans(points, 4, seed=0)
    assert len(info.value.problems) == 1
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_codes_that_are_not_finite_are_refused(value):
    points = noise()
    points[17, 2] = value
    with pytest.raises(ConfigError, match="diverged"):
        spherical_kmeans(points, 3, seed=0)


@pytest.mark.parametrize(("count", "restarts"), [(0, 1), (3, 0)])
def test_no_cluster_and_no_start_are_refused(count, restarts):
    with pytest.raises(ConfigError, match="at least 1"):
        spherical_kmeans(noise(), count, seed=0, restarts=restarts)


def test_points_that_are_no_matrix_are_refused():
    with pytest.raises(ShapeError, match=r"\(N, D\)"):
        spherical_kmeans(torch.zeros(2, 3, 4), 1, seed=0)


def test_half_precision_points_are_fitted_in_single_precision():
    points, _ = planted()
    assert spherical_kmeans(points.half(), 8, seed=0).centroids.dtype == torch.float32


def test_starts_are_spread_further_than_random_points():
    points, _ = planted(count=12, each=80)
    spread, uniform = [], []
    for seed in range(10):
        start = spherical_kmeans(points, 12, seed=seed, restarts=1, max_iterations=0)
        spread.append(start.objective)
        chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:12]
        unit = torch.nn.functional.normalize(points, dim=1)
        uniform.append((unit @ unit[chosen].T).max(dim=1).values.mean().item())
    assert np.mean(spread) > np.mean(uniform)


def test_ten_thousand_codes_take_little_processor_time():
    points = noise(rows=10_000, dim=70)
    before = time.process_time()
    spherical_kmeans(points, 27, seed=0, restarts=1)
    # About 0.2 s on one core; the bound only catches loops over points.
    assert time.process_time() - before < 5


def test_a_move_that_lowers_the_objective_is_not_kept(monkeypatch):
    points, directions = planted()
    unit = torch.nn.functional.normalize(points, dim=1)
    monkeypatch.setattr(kmeans, "_move", lambda *_: (torch.ones_like(directions) / 24**0.5, 0))
    points = kmeans._Points.of(unit, torch.ones(len(unit)))
    centroids, objective, _ = kmeans._iterate(points, directions, 10)
    assert centroids.equal(directions)
    assert objective > 0.8


def test_a_point_of_weight_three_counts_like_three_points():
    points = noise(40)
    weights = torch.ones(40)
    weights[::4] = 3
    repeated = torch.cat([points, points[::4], points[::4]])
    start = torch.nn.functional.normalize(points[:5], dim=1)
    unit = torch.nn.functional.normalize(points, dim=1)
    once = kmeans._Points.of(unit, weights / weights.mean())
    weighted, objective, _ = kmeans._iterate(once, start, 30)
    unit = torch.nn.functional.normalize(repeated, dim=1)
    thrice = kmeans._Points.of(unit, torch.ones(len(unit)))
    expected, of_repeated, _ = kmeans._iterate(thrice, start, 30)
    torch.testing.assert_close(weighted, expected, atol=1e-5, rtol=1e-5)
    assert objective == pytest.approx(of_repeated, abs=1e-6)


def test_points_without_weight_attract_no_cluster():
    points, directions = planted(count=4)
    weights = torch.ones(len(points)).reshape(4, -1)
    weights[0] = 0
    found = spherical_kmeans(points, 3, seed=0, weights_N=weights.flatten()).centroids
    assert (directions[1:] @ found.T).max(1).values.min() > 0.99
    assert (directions[0] @ found.T).max() < 0.9


def test_there_must_be_a_weight_for_each_point():
    with pytest.raises(ShapeError, match="3 weights for 400 points"):
        spherical_kmeans(noise(), 2, seed=0, weights_N=torch.ones(3))


def test_a_preference_decides_between_starts_that_are_nearly_as_good():
    # Every cut of a circle is as good; starts find many.
    angles = torch.arange(0, 360, 0.5).deg2rad()
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)

    def upright(centroids: Tensor) -> float:
        return float(centroids[:, 1].abs().max())

    plain = spherical_kmeans(circle, 2, seed=0, restarts=12)
    preferred = spherical_kmeans(circle, 2, seed=0, restarts=12, prefer=upright)
    assert upright(preferred.centroids) > 0.99 > upright(plain.centroids)
    assert preferred.objectives == plain.objectives


def test_a_slight_preference_does_not_make_up_for_a_worse_start():
    points = noise(400, 6)
    plain = spherical_kmeans(points, 12, seed=0, restarts=12)
    assert max(plain.objectives) > 1.002 * min(plain.objectives)

    def slight(centroids: Tensor) -> float:
        is_best = torch.equal(centroids, plain.centroids)
        return 0.0 if is_best else 1e-6

    again = spherical_kmeans(points, 12, seed=0, restarts=12, prefer=slight)
    assert again.objective == pytest.approx(plain.objective, rel=1e-6)

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from factories import ring_neighbors, train_job

from stego_core.neighbors.search import NONE
from stego_core.training.sampler import StepReads, draw_step


def draws(step, *, neighbors=None, channels=8, **settings):
    neighbors = ring_neighbors(9) if neighbors is None else neighbors
    job = train_job(**settings)
    return draw_step(job, step, neighbors_VN=neighbors, channels=channels)


def same(a, b):
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return [bool(np.array_equal(np.asarray(x), np.asarray(y))) for x, y in pairs]


def test_seed_and_step_alone_decide_every_draw():
    first = draws(5, seed=3)
    torch.manual_seed(99)
    np.random.seed(99)
    draws(0, seed=1)
    assert all(same(first, draws(5, seed=3)))


def test_another_step_and_another_seed_change_every_draw():
    first = draws(5, train={"batch": 8}, neighbors=ring_neighbors(50, 5))
    for other in ({"step": 6}, {"step": 5, "seed": 1}):
        settings = {"train": {"batch": 8}, "neighbors": ring_neighbors(50, 5)}
        assert not any(same(first, draws(**other, **settings)))


def test_the_global_generators_are_left_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    draws(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("views", "batch"), [(9, 4), (12, 4), (3, 8), (1, 2), (50, 16)])
def test_each_view_is_seen_once_per_epoch(views, batch):
    neighbors = np.full((views, 1), NONE)
    steps = -(-5 * views // batch)
    settings = {"train": {"batch": batch}, "neighbors": neighbors}
    seen = np.concatenate([draws(step, **settings).anchors for step in range(steps)])
    epochs = seen[: 5 * views].reshape(5, views)
    assert (np.sort(epochs, 1) == np.arange(views)).all()
    if views >= 9:
        assert len({tuple(epoch) for epoch in epochs}) == 5


def test_neighbours_are_drawn_from_those_given_and_all_of_them_are():
    neighbors = ring_neighbors(9, 3)
    found = {view: set() for view in range(9)}
    for step in range(120):
        drawn = draws(step, neighbors=neighbors)
        for anchor, other in zip(drawn.anchors, drawn.neighbors, strict=True):
            found[int(anchor)].add(int(other))
    assert found == {view: set(neighbors[view].tolist()) for view in range(9)}


def test_gaps_among_the_neighbours_are_never_drawn_and_without_any_the_view_is_its_own():
    neighbors = np.array([[1, NONE, NONE], [2, 0, NONE], [NONE] * 3, [0, 1, 2]])
    pairs = set()
    for step in range(60):
        drawn = draws(step, neighbors=neighbors)
        pairs |= {*zip(drawn.anchors.tolist(), drawn.neighbors.tolist(), strict=True)}
    assert pairs == {(0, 1), (1, 2), (1, 0), (2, 2), (3, 0), (3, 1), (3, 2)}


def test_random_partners_are_permutations_without_fixed_points():
    for step in range(20):
        partners = draws(step, train={"batch": 5}, loss={"negatives": 4}).partners
        assert partners.shape == (4, 5)
        for row in partners:
            assert sorted(row.tolist()) == list(range(5))
            assert (row != torch.arange(5)).all()


def test_a_batch_of_one_view_is_its_own_partner():
    assert draws(0, train={"batch": 1}).partners.tolist() == [[0], [0]]


def test_the_shapes_and_ranges_are_those_that_are_promised():
    drawn = draws(0, train={"batch": 6, "linear_pixels": 7}, loss={"samples": 5, "negatives": 3})
    assert drawn.coords_anchor.shape == drawn.coords_other.shape == (6, 5, 5, 2)
    assert drawn.keep.shape == (2, 3, 6, 8, 1, 1)
    assert drawn.pixels.shape == (6, 7, 2)
    for coords in (drawn.coords_anchor, drawn.coords_other):
        assert -1 <= coords.min() < -0.8
        assert 0.8 < coords.max() <= 1
    assert not torch.equal(drawn.coords_anchor, drawn.coords_other)
    assert drawn.pixels.min() >= 0
    assert drawn.pixels.max() < 1


def test_dropout_keeps_the_mean_and_is_drawn_apart_for_every_use():
    keep = draws(0, head={"dropout": 0.25}, channels=4000).keep
    # 24 * 4000 draws of variance 1/3: the standard error of the mean is 0.002.
    assert keep.mean() == pytest.approx(1, abs=0.01)
    assert keep.unique().tolist() == pytest.approx([0, 4 / 3])
    rows = keep.view(-1, 4000)
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_without_dropout_nothing_is_dropped():
    assert (draws(0, head={"dropout": 0.0}).keep == 1).all()


def test_the_reads_of_all_workers_are_the_views_of_the_steps_from_any_step_on():
    job, neighbors = train_job(train={"steps": 9}), ring_neighbors(9)
    neighbors[3] = NONE
    shares = [StepReads(job, 5, 9, slice(r, r + 2), neighbors) for r in (0, 2)]
    assert [len(share) for share in shares] == [8, 8]
    for step in range(5, 9):
        draws = draw_step(job, step, neighbors_VN=neighbors, channels=8)
        for kind, views in enumerate((draws.anchors, draws.neighbors)):
            parts = [share[2 * (step - 5) + kind] for share in shares]
            assert np.array_equal(np.concatenate(parts), views)
    assert len(StepReads(job, 9, 9, slice(0, 4), neighbors)) == 0

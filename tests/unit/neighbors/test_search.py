from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from factories import unit_rows
from reference import neighbors_reference as reference

from stego_core.neighbors import search
from stego_core.neighbors.search import NONE, exact_top_k, merge_top_k

# Float32 scores against float64 sums of the same float32 vectors.
TOLERANCE = 1e-6
SIZES = [1, 2, 15, 16, 17, 29, 30, 31, 200]


def run(rows, k, *, groups=None, queries=slice(None), gallery=slice(None), **options):
    rows = torch.as_tensor(rows)
    groups = torch.arange(len(rows)) if groups is None else torch.as_tensor(groups)
    return exact_top_k(
        rows[queries],
        rows[gallery],
        k,
        query_groups_Q=groups[queries],
        gallery_groups_G=groups[gallery],
        **options,
    )


def sharded(rows, k, cuts, *, groups=None):
    """The search over parts of the gallery, merged in any order."""
    best = (torch.full((len(rows), k), -torch.inf), torch.full((len(rows), k), NONE))
    for start, end in reversed(list(itertools.pairwise(cuts))):
        scores, index = run(rows, k, groups=groups, gallery=slice(start, end))
        part = scores, torch.where(index == NONE, NONE, index + start)
        best = merge_top_k(best, part, k)
    return best


def with_duplicates(count, *, dim=64, seed=0):
    """Real-valued rows of which each stands there about four times, at scattered places."""
    rows = unit_rows(max(1, count // 4), dim, seed=seed)
    return rows[np.random.default_rng(seed).integers(0, len(rows), count)]


@pytest.mark.parametrize("count", SIZES)
def test_the_search_equals_brute_force(count):
    rows, groups = unit_rows(count, 24, seed=count), np.arange(count) // 2
    scores, indices = run(rows, 30, groups=groups)
    expected, expected_indices = reference.top_k(rows, rows, 30, groups, groups)
    assert scores.dtype == torch.float32
    assert indices.dtype == torch.int64
    np.testing.assert_allclose(scores, expected, atol=TOLERANCE)
    np.testing.assert_array_equal(indices, expected_indices)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("columns", [1, 7, 16])
def test_tiles_of_any_shape_give_the_same_neighbours_to_the_last_bit(count, columns, monkeypatch):
    rows = with_duplicates(count, seed=count)
    scores, indices = run(rows, 30)
    monkeypatch.setattr(search, "_COLUMNS", columns)
    for tile_bytes in (1 if count < 100 else 800, 8 * columns * 5, 2**20):
        again, again_indices = run(rows, 30, tile_bytes=tile_bytes)
        assert torch.equal(indices, again_indices)
        assert torch.equal(scores, again)


@pytest.mark.parametrize("count", SIZES)
def test_merged_shards_give_the_same_neighbours_to_the_last_bit(count):
    rows = with_duplicates(count, seed=count)
    scores, indices = run(rows, 30)
    for cuts in ([0, count], [0, count // 3, count], [*range(0, count, 13), count]):
        again, again_indices = sharded(rows, 30, cuts)
        assert torch.equal(indices, again_indices)
        assert torch.equal(scores, again)


@pytest.mark.parametrize("dim", [24, 64, 384])
def test_each_query_alone_finds_what_it_finds_among_others(dim):
    rows = with_duplicates(60, dim=dim)
    scores, indices = run(rows, 20)
    for query in range(0, 60, 7):
        one, one_indices = run(rows, 20, queries=slice(query, query + 1))
        assert torch.equal(one_indices[0], indices[query])
        assert torch.equal(one[0], scores[query])


@pytest.mark.parametrize("columns", [3, 4, 50, 8192])
def test_equal_scores_are_ordered_by_index_whatever_the_tiling(columns, monkeypatch):
    monkeypatch.setattr(search, "_COLUMNS", columns)
    rows = np.repeat(unit_rows(2, 33), 25, axis=0)  # views 0..24 are equal, 25..49 are equal
    _, indices = run(rows, 30, tile_bytes=8 * columns * 3)
    others = [i for i in range(25) if i != 4]
    assert indices[4].tolist() == others + list(range(25, 31))
    others = [i for i in range(25, 50) if i != 40]
    assert indices[40].tolist() == others + list(range(6))


def test_a_tie_for_the_last_place_goes_to_the_lower_index():
    rows = np.tile(unit_rows(1, 17), (300, 1))
    scores, indices = run(rows, 5)
    assert indices[0].tolist() == [1, 2, 3, 4, 5]
    assert indices[299].tolist() == [0, 1, 2, 3, 4]
    assert len(torch.unique(scores)) == 1


def test_the_own_group_is_never_a_neighbour():
    rows = np.tile(unit_rows(1, 8), (20, 1))
    groups = np.arange(20) // 5 + 10**12
    _, indices = run(rows, 30, groups=groups)
    for view in range(20):
        found = indices[view][indices[view] != NONE].tolist()
        assert found == [other for other in range(20) if other // 5 != view // 5]


def test_too_few_candidates_leave_gaps_at_the_end():
    rows, groups = unit_rows(6, 8), [0, 0, 0, 0, 1, 1]
    scores, indices = run(rows, 5, groups=groups)
    assert (indices[:4, :2] >= 4).all()
    assert (indices[:4, 2:] == NONE).all()
    assert torch.isinf(scores[:4, 2:]).all()
    assert (indices[4:, 4] == NONE).all()


def test_a_single_view_has_no_neighbour():
    scores, indices = run(unit_rows(1, 8), 3)
    assert indices.tolist() == [[NONE] * 3]
    assert scores.tolist() == [[-np.inf] * 3]


def test_no_queries_and_no_gallery_give_empty_results():
    scores, indices = run(unit_rows(4, 8), 3, queries=slice(0, 0))
    assert scores.shape == indices.shape == (0, 3)
    scores, indices = run(unit_rows(4, 8), 3, gallery=slice(0, 0))
    assert (indices == NONE).all()
    assert indices.shape == (4, 3)


def test_the_inputs_are_left_as_they_are():
    rows = torch.from_numpy(unit_rows(5, 8))
    before = rows.clone()
    run(rows, 3)
    assert torch.equal(rows, before)


def test_merging_keeps_the_best_of_both_and_orders_ties_by_index():
    a = torch.tensor([[0.9, 0.5, -torch.inf]]), torch.tensor([[7, 8, NONE]])
    b = torch.tensor([[0.9, 0.6, 0.5]]), torch.tensor([[3, 9, 1]])
    for first, second in ((a, b), (b, a)):
        scores, indices = merge_top_k(first, second, 4)
        assert indices.tolist() == [[3, 7, 9, 1]]
        assert scores[0].tolist() == pytest.approx([0.9, 0.9, 0.6, 0.5])

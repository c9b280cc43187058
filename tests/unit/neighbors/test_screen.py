"""The fast first pass: whatever it is, the result is that of exact scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import unit_rows

from stego_core.neighbors import screen as screen_module
from stego_core.neighbors import search
from stego_core.neighbors.scores import NONE, best_candidates
from stego_core.neighbors.screen import screen
from stego_core.neighbors.search import exact_top_k


def clustered(count, dim, *, centres=20, spread=0.5, seed=0):
    generator = np.random.default_rng(seed)
    centre = unit_rows(centres, dim, seed=seed)[generator.integers(0, centres, count)]
    rows = centre + spread * generator.normal(size=(count, dim)) / dim**0.5
    return torch.from_numpy((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


def duplicated(count, dim, *, distinct, seed=0):
    rows = unit_rows(distinct, dim, seed=seed)
    return torch.from_numpy(rows[np.random.default_rng(seed).integers(0, distinct, count)])


def near_duplicates(count, dim):
    """Rows so alike that bfloat16, and in part float32, can't tell which are nearer."""
    noise = np.random.default_rng(0).normal(size=(count, dim)) * 1e-4
    rows = unit_rows(1, dim) + noise
    return torch.from_numpy((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


ROWS = {
    "clustered": clustered(2500, 48),
    "duplicates": duplicated(2500, 48, distinct=40),
    "near duplicates": near_duplicates(2500, 48),
    "random": torch.from_numpy(unit_rows(2500, 48)),
}


def run(rows, k, precision, **options):
    groups = torch.arange(len(rows)) // 3
    queries = slice(0, len(rows), 40)
    return exact_top_k(
        rows[queries],
        rows,
        k,
        query_groups_Q=groups[queries].contiguous(),
        gallery_groups_G=groups,
        precision=precision,
        **options,
    )


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tile_bytes", [2**12, 2**26])
def test_the_fast_pass_changes_no_bit_of_the_result(kind, precision, tile_bytes):
    expected, expected_indices = run(ROWS[kind], 30, "fp64")
    scores, indices = run(ROWS[kind], 30, precision, tile_bytes=tile_bytes)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_row_scores_further_from_the_truth_than_the_error_says(precision):
    rows = ROWS["clustered"]
    own = torch.arange(len(rows))
    found = screen(
        rows[:50],
        rows,
        len(rows) - 1,
        query_groups_Q=own[:50],
        gallery_groups_G=own,
        tile_bytes=2**20,
        precision=precision,
    )
    truth = (rows[:50].double() @ rows.double().T).gather(1, found.indices)
    wrong = (found.scores.double() - truth).abs().max().item()
    assert 0 < wrong <= found.error
    assert found.error < (2e-5 if precision == "fp32" else 0.02)


@pytest.mark.parametrize("columns", [40, 64, 1000])
def test_candidates_are_the_best_by_score_whatever_the_groups_of_columns(columns, monkeypatch):
    monkeypatch.setattr(screen_module, "_COLUMNS", columns)
    rows = ROWS["random"][:1000]
    own = torch.arange(len(rows))
    found = screen(
        rows[:30],
        rows,
        25,
        query_groups_Q=own[:30],
        gallery_groups_G=own,
        tile_bytes=2**20,
        precision="fp32",
    )
    scores = rows[:30].double() @ rows.double().T
    scores[own[:30], own[:30]] = -torch.inf
    expected = scores.topk(25, 1).indices
    assert torch.equal(found.indices.sort(1).values, expected.sort(1).values)


def test_the_finer_search_is_only_for_the_queries_that_need_it(monkeypatch):
    asked = []
    slow = search._by_float64

    def counting(queries, *arguments, **options):
        asked.append(len(queries))
        return slow(queries, *arguments, **options)

    monkeypatch.setattr(search, "_by_float64", counting)
    run(ROWS["random"], 10, "fp32")
    assert asked == []
    run(ROWS["duplicates"], 10, "fp32")
    assert asked == [63]


def test_the_own_group_is_no_candidate_even_if_it_is_the_whole_gallery():
    rows = ROWS["random"][:2100]
    same = torch.zeros(2100, dtype=torch.int64)
    scores, indices = exact_top_k(
        rows[:5], rows, 4, query_groups_Q=same[:5], gallery_groups_G=same, precision="fp32"
    )
    assert (indices == NONE).all()
    assert torch.isinf(scores).all()


def test_candidates_that_are_missing_stay_missing_and_lists_are_filled_up():
    rows = ROWS["random"][:10]
    candidates = torch.tensor([[3, NONE, 7], [NONE, NONE, NONE]])
    scores, indices = best_candidates(rows[:2], rows, candidates, 4, tile_bytes=1)
    assert sorted(indices[0, :2].tolist()) == [3, 7]
    assert indices[0, 2:].tolist() == [NONE, NONE]
    assert (indices[1] == NONE).all()
    assert torch.isinf(scores[1]).all()
    assert rows.dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "inside"), [("fp32", ("ieee", "ieee")), ("bf16", ("bf16", "tf32"))]
)
def test_arithmetic_is_chosen_for_the_products_alone(monkeypatch, precision, inside):
    settings = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = [one.fp32_precision for one in settings]
    seen, product = [], screen_module._product

    def watched(*args):
        seen.append(tuple(one.fp32_precision for one in settings))
        return product(*args)

    monkeypatch.setattr(screen_module, "_product", watched)
    run(ROWS["clustered"], 5, precision)
    assert {*seen} == {inside}
    assert [one.fp32_precision for one in settings] == before

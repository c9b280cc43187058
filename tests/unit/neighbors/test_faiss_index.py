"""FAISS behind the interface of the exact search."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_screen import clustered

from stego_core.config.neighbors import NeighborsConfig, search_settings
from stego_core.errors import ConfigError
from stego_core.neighbors import faiss_index
from stego_core.neighbors.faiss_index import FaissIndex, code_bytes, num_lists, train_index
from stego_core.neighbors.plan import plan_search
from stego_core.neighbors.recall import recall, sample_views
from stego_core.neighbors.scores import NONE, merge_top_k
from stego_core.neighbors.search import exact_top_k

METHODS = ("flat", "ivf-flat", "ivf-pq")


@pytest.fixture(scope="module")
def rows():
    pytest.importorskip("faiss")
    return clustered(2000, 32, centres=30)


@pytest.fixture(scope="module")
def trained(rows):
    return {m: train_index(rows.numpy(), m, lists=16, seed=3) for m in METHODS}


def groups_of(rows):
    return torch.arange(len(rows)) // 2


def search(trained, rows, *, probes=16, k=10, gallery=slice(None), rerank=4):
    groups = groups_of(rows)
    index = FaissIndex(trained, rows[gallery], groups[gallery], probes=probes, rerank=rerank)
    return index.top_k(rows[:200], groups[:200], k)


def exact(rows, k=10):
    groups = groups_of(rows)
    return exact_top_k(rows[:200], rows, k, query_groups_Q=groups[:200], gallery_groups_G=groups)


def test_a_flat_index_equals_the_exact_search_to_the_last_bit(rows, trained):
    scores, indices = search(trained["flat"], rows)
    expected, expected_indices = exact(rows)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("method", METHODS)
def test_all_lists_probed_find_nearly_all_and_one_finds_fewer(rows, trained, method):
    truth = exact(rows)[1].numpy()
    every = recall(search(trained[method], rows)[1].numpy(), truth)
    assert every == 1 if method != "ivf-pq" else every > 0.8
    one = recall(search(trained[method], rows, probes=1)[1].numpy(), truth)
    assert one == 1 if method == "flat" else 0.1 < one < 1


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_exact_and_fall_and_own_views_are_left_out(rows, trained, method):
    scores, indices = search(trained[method], rows)
    truth = (rows[:200].double() @ rows.double().T).gather(1, indices.clamp(min=0))
    torch.testing.assert_close(scores.double(), truth, atol=1e-6, rtol=0)
    assert (scores.diff(dim=1) <= 0).all()
    assert (groups_of(rows)[indices] != groups_of(rows)[:200, None]).all()


@pytest.mark.parametrize("method", METHODS)
def test_training_and_search_are_the_same_every_time(rows, trained, method):
    assert train_index(rows.numpy(), method, lists=16, seed=3) == trained[method]
    first, second = (search(trained[method], rows, probes=3) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_shards_of_one_training_find_together_what_one_index_finds(rows, trained):
    _, whole = search(trained["ivf-flat"], rows, probes=4, rerank=20)
    best = None
    for start in (0, 1000):
        scores, found = search(
            trained["ivf-flat"], rows, probes=4, rerank=20, gallery=slice(start, start + 1000)
        )
        part = scores, torch.where(found == NONE, NONE, found + start)
        best = part if best is None else merge_top_k(best, part, 10)
    assert torch.equal(best[1], whole)


def test_lists_that_hold_too_few_leave_gaps(rows, trained):
    scores, indices = search(trained["ivf-flat"], rows, probes=1, gallery=slice(0, 40), k=30)
    assert (indices == NONE).any()
    assert (torch.isinf(scores) == (indices == NONE)).all()


def test_too_few_views_are_searched_exactly_and_the_plan_says_why():
    pytest.importorskip("faiss")
    for count in (1, 2, 1000, 24_000):
        plan = plan_search(NeighborsConfig(method="ivf-flat"), count, 384)
        assert plan.method == "exact"
        assert f"there are {count}" in plan.line(NeighborsConfig())
    plan = plan_search(NeighborsConfig(method="ivf-flat"), 40_000, 384)
    assert (plan.method, plan.lists) == ("ivf-flat", num_lists(0, 40_000))
    few = NeighborsConfig(method="ivf-pq", lists=4)
    assert plan_search(few, 9_000, 384).method == "exact"
    assert plan_search(few, 10_000, 384).method == "ivf-pq"


def test_the_plan_counts_embeddings_once_and_an_index_per_actor():
    pytest.importorskip("faiss")
    millions, tile = 4_000_000, 2**26
    plans = {
        m: plan_search(NeighborsConfig(method=m, shard_views=2_000_000), millions, 384)
        for m in ("exact", "flat", "ivf-pq")
    }
    assert {plan.store_bytes for plan in plans.values()} == {millions * 384 * 4}
    assert {plan.num_shards for plan in plans.values()} == {2}
    assert 3 * tile <= plans["exact"].actor_bytes < 4 * tile
    working = plans["exact"].actor_bytes
    assert plans["flat"].actor_bytes >= working + 2_000_000 * 384 * 4
    assert plans["ivf-pq"].actor_bytes - working < 2_000_000 * 384  # codes are a fraction


def test_without_faiss_the_error_is_one_line_that_names_the_extras(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError) as error:
        plan_search(NeighborsConfig(method="flat"), 100, 384)
    assert "\n" not in str(error.value)
    assert "stego-ray[cpu]" in str(error.value)
    assert "stego-ray[gpu]" in str(error.value)
    assert plan_search(NeighborsConfig(), 100, 384).method == "exact"


def test_codes_divide_the_channels():
    for dim in (32, 384, 768, 1024, 1536, 30, 7, 1):
        assert dim % code_bytes(dim) == 0
    # 1024 channels could have 128, but FAISS has no such codes on a GPU.
    assert [code_bytes(dim) for dim in (384, 768, 1024, 1152, 30, 7)] == [48, 96, 64, 96, 3, 1]


@pytest.mark.parametrize(("method", "is_rounded"), [("flat", False), ("ivf-pq", True)])
def test_on_a_gpu_only_tables_of_quantised_codes_are_in_half_precision(
    monkeypatch, method, is_rounded
):
    faiss = pytest.importorskip("faiss")
    moved = []

    def move(resources, device, index, options):
        moved.append((device, options.useFloat16))
        return index

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "GpuClonerOptions", SimpleNamespace, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", move, raising=False)
    vectors = clustered(700, 8, centres=9)
    trained = train_index(vectors.numpy(), method, lists=1, seed=0)
    groups = torch.arange(700)
    index = FaissIndex(trained, vectors, groups, probes=1, rerank=4, device="cuda")
    assert moved == [(0, is_rounded)]
    # It answers as it does on a CPU: more candidates than a GPU returns are not asked for.
    _, found = index.top_k(vectors[:5], groups[:5], 3)
    cpu = FaissIndex(trained, vectors, groups, probes=1, rerank=4)
    assert torch.equal(found, cpu.top_k(vectors[:5], groups[:5], 3)[1])


def test_only_settings_that_change_the_table_are_part_of_its_key():
    assert search_settings(NeighborsConfig()) == search_settings(
        NeighborsConfig(precision="bf16", tile_bytes=1, shard_views=5, probes=3, lists=9, rerank=2)
    )
    ivf = NeighborsConfig(method="ivf-flat")
    assert search_settings(ivf) != search_settings(NeighborsConfig(method="ivf-pq"))
    assert search_settings(ivf) != search_settings(NeighborsConfig(method="ivf-flat", probes=3))


def test_recall_counts_the_true_neighbours_that_were_found():
    true = np.array([[1, 2, 3], [4, NONE, NONE]])
    assert recall(true[:, ::-1], true) == 1
    assert recall(np.array([[1, 9, 3], [NONE, NONE, NONE]]), true) == 0.5
    assert recall(np.full((2, 3), NONE), np.full((2, 3), NONE)) == 1


def test_samples_are_distinct_and_follow_from_the_seed():
    one = sample_views(5000, None, seed=0)
    assert len(np.unique(one)) == 1000
    assert (one == sample_views(5000, None, seed=0)).all()
    assert (one != sample_views(5000, None, seed=1)).any()
    assert set(one) != set(sample_views(5000, 1000, seed=0))
    assert sample_views(3, None, seed=0).tolist() == [0, 1, 2]
    assert faiss_index.training_rows("flat", 0) == 0

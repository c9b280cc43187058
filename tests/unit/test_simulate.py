"""The simulator's arithmetic beside counting one thing at a time."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.mining_sizes import fitted, predicted
from benchmarks.simulate import Cluster, Costs, exact_flops, ivf_flops, predict, read_costs

SMALL = Cluster(
    images=60,
    crops=2,
    accelerators=3,
    accelerator_images_per_s=4.0,
    cpus=5,
    search_gflops=1e-6,
    accelerator_price=7.0,
    cpu_price=0.5,
    storage_price=0.02,
    efficiency=0.5,
)
COSTS = Costs(start_s=9.0, decode_s=0.3, feature_bytes=50.0, pixel_bytes=30.0, dim=4)


def test_operations_are_those_of_three_loops():
    views, dim, lists, probes = 12, 3, 4, 2
    exact = sum(2 for _ in range(views) for _ in range(views) for _ in range(dim))
    assert exact_flops(views, dim) == exact
    training = sum(2 * dim for _ in range(10) for _ in range(views) for _ in range(lists))
    filling = sum(2 * dim for _ in range(views) for _ in range(lists))
    per_list = views // lists
    searching = sum(
        2 * dim * lists + sum(2 * dim for _ in range(probes) for _ in range(per_list))
        for _ in range(views)
    )
    assert ivf_flops(views, dim, lists, probes) == training + filling + searching


def test_the_slowest_stage_sets_the_time_as_if_images_were_dealt_out_one_by_one():
    decoding, backbone = [0.0] * SMALL.cpus, [0.0] * SMALL.accelerators
    for image in range(SMALL.images):
        decoding[image % SMALL.cpus] += COSTS.decode_s
        for crop in range(SMALL.crops):
            view = image * SMALL.crops + crop
            backbone[view % SMALL.accelerators] += 1 / SMALL.accelerator_images_per_s
    found = predict(SMALL, COSTS, lists=4)
    rate = 3 * 1e-6 * 1e9 * 0.5
    assert found.exact_search_s == pytest.approx(2 * 120 * 120 * 4 / rate)
    assert found.ivf_search_s == pytest.approx(ivf_flops(120, 4, 4, 32) / rate / 0.05)
    assert found.bottleneck == "backbone"
    expected = COSTS.start_s + max(max(decoding), max(backbone)) / SMALL.efficiency
    assert found.embed_s == pytest.approx(expected)
    slow = predict(replace(SMALL, cpus=1), COSTS, lists=4)
    assert slow.bottleneck == "decoding"
    assert slow.embed_s == pytest.approx(9 + 60 * 0.3 / 0.5)


def test_sizes_and_prices_are_sums_over_views():
    found = predict(SMALL, COSTS, lists=4)
    views = SMALL.images * SMALL.crops
    assert found.feature_store_bytes == sum(50 for _ in range(views))
    assert found.embedding_bytes == sum(4 * 4 for _ in range(views))
    assert found.object_store_bytes == sum(30 + 16 for _ in range(views))
    assert found.unit_table_bytes == sum(16 + 16 for _ in range(views))
    assert found.in_flight_bytes == sum(30 for _ in range(views))  # 3 * 3 * 64 are more
    many = predict(replace(SMALL, images=1000), COSTS, lists=4)
    assert many.in_flight_bytes == sum(30 for _ in range(3 * 3 * 64))
    base, actors = COSTS.base_bytes, sum(COSTS.actor_bytes for _ in range(3))
    grown = found.in_flight_bytes + sum(16 + 16 + 16 for _ in range(views))
    assert found.memory_bytes == base + actors + grown
    hours = (found.embed_s + found.ivf_search_s) / 3600
    assert found.compute_price == pytest.approx(hours * (3 * 7.0 + 5 * 0.5))
    assert found.storage_price_per_month == pytest.approx(views * (50 + 32 + 30 * 13) / 1e9 * 0.02)


def test_costs_of_two_sizes_predict_a_third_that_grows_along_their_line():
    def of(images):
        grown = 3 * images * 384 * 4 + min(images, 192) * read_costs().pixel_bytes
        return {
            "images": images,
            "elapsed_s": 5 + images / 10,
            "actor_bytes": 700,
            "other_bytes": 400 + grown,
        }

    costs, rate = fitted(of(20), of(80))
    assert (costs.base_bytes, costs.actor_bytes) == (pytest.approx(400), 700)
    assert (costs.start_s, rate) == pytest.approx((5, 10))
    for images in (20, 80, 160, 800):
        found, made = predicted(images, costs, rate), of(images)
        assert found["embed_s"] == pytest.approx(made["elapsed_s"])
        assert found["memory_bytes"] == pytest.approx(made["other_bytes"] + made["actor_bytes"])


def test_more_accelerators_divide_the_search_and_more_images_multiply_it():
    one = predict(SMALL, COSTS, lists=4)
    assert predict(replace(SMALL, accelerators=6), COSTS, lists=4).exact_search_s == (
        pytest.approx(one.exact_search_s / 2)
    )
    assert predict(replace(SMALL, images=120), COSTS, lists=4).exact_search_s == (
        pytest.approx(one.exact_search_s * 4)
    )

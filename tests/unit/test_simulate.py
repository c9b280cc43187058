"""The simulator's arithmetic beside counting one thing at a time."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.mining_sizes import fitted, predicted
from benchmarks.simulate import (
    Cluster,
    Costs,
    exact_flops,
    ivf_flops,
    predict,
    read_costs,
    search_waves,
    training_flops,
)
from stego_core.config.neighbors import NeighborsConfig
from stego_core.distributed.search import Shard, _Searchers
from stego_core.neighbors.faiss_index import num_lists, training_rows
from stego_core.neighbors.plan import QUERY_BLOCK

SMALL = Cluster(
    images=60,
    crops=2,
    accelerators=3,
    nodes=2,
    accelerator_images_per_s=4.0,
    cpus=5,
    search_gflops=1e-6,
    accelerator_price=7.0,
    cpu_price=0.5,
    storage_price=0.02,
    efficiency=0.5,
)
COSTS = Costs(
    start_s=9.0, decode_s=0.3, feature_bytes=50.0, pixel_bytes=30.0, dim=4, train_gflops=1e-3
)


def waves_of_the_job(views: int, shard_views: int, actors: int) -> list[list[tuple[Shard, int]]]:
    searchers = object.__new__(_Searchers)
    searchers._count = actors
    searchers._shards = [
        Shard(start, min(shard_views, views - start), None, None)
        for start in range(0, views, shard_views)
    ]
    return searchers._waves(len(searchers._blocks()))


SIZES = [
    (120, 2**20, 3),
    (6 * QUERY_BLOCK, 2 * QUERY_BLOCK, 2),
    (7 * QUERY_BLOCK + 5, 2 * QUERY_BLOCK, 3),
    (3 * QUERY_BLOCK, QUERY_BLOCK // 2 + 1, 64),
    (2**27, 2**20, 100),
]


@pytest.mark.parametrize(("views", "shard_views", "actors"), SIZES)
def test_shards_are_searched_in_the_waves_of_the_job(views, shard_views, actors):
    expected = [
        (max(shard.rows for shard, _ in wave), *{count for _, count in wave})
        for wave in waves_of_the_job(views, shard_views, actors)
    ]
    assert search_waves(views, actors=actors, shard_views=shard_views) == expected


def test_numbers_that_the_job_has_are_those_of_the_job():
    views = 10**6
    lists = num_lists(0, views)
    assert predict(Cluster(images=views), COSTS) == predict(
        Cluster(images=views), COSTS, lists=lists, shard_views=NeighborsConfig().shard_views
    )
    assert training_flops(views, 1, 50) == 2 * training_rows("ivf-flat", 50) * 50 * 10


def test_operations_of_training_are_those_of_three_loops():
    views, dim, lists = 12, 3, 4
    counted = sum(2 * dim for _ in range(10) for _ in range(views) for _ in range(lists))
    assert training_flops(views, dim, lists) == counted


def test_operations_of_the_search_are_those_of_the_busiest_actor_of_each_wave():
    views, dim, lists, probes = 6 * QUERY_BLOCK, 3, 4, 2
    exact, ivf = 0, 0
    for wave in waves_of_the_job(views, 2 * QUERY_BLOCK, 2):
        exact_of, ivf_of = [], []
        for shard, count in wave:
            for actor in range(count):
                queries = QUERY_BLOCK * len(range(actor, 6, count))
                exact_of.append(2 * dim * queries * shard.rows)
                filling = 2 * dim * shard.rows * lists
                searching = 2 * dim * queries * (lists + probes * shard.rows // lists)
                ivf_of.append(2 * filling + searching)  # once more for the recall
        exact, ivf = exact + max(exact_of), ivf + max(ivf_of)
    waves = search_waves(views, actors=2, shard_views=2 * QUERY_BLOCK)
    assert exact_flops(views, dim, waves) == exact
    assert ivf_flops(views, dim, waves, lists=lists, probes=probes) == ivf


def test_an_index_is_trained_on_one_thread_whatever_the_number_of_accelerators():
    one = predict(replace(SMALL, images=10**6), COSTS, lists=100)
    many = predict(replace(SMALL, images=10**6, accelerators=50), COSTS, lists=100)
    assert one.ivf_training_s == many.ivf_training_s == 2 * 4 * 6400 * 100 * 10 / 1e6
    assert many.ivf_search_s - many.ivf_training_s < one.ivf_search_s - one.ivf_training_s


def test_the_slowest_stage_sets_the_time_as_if_images_were_dealt_out_one_by_one():
    decoding, backbone = [0.0] * SMALL.cpus, [0.0] * SMALL.accelerators
    for image in range(SMALL.images):
        decoding[image % SMALL.cpus] += COSTS.decode_s
        for crop in range(SMALL.crops):
            view = image * SMALL.crops + crop
            backbone[view % SMALL.accelerators] += 1 / SMALL.accelerator_images_per_s
    found = predict(SMALL, COSTS, lists=4)
    rate = 1e-6 * 1e9 * 0.5  # 120 views are one block, which one actor searches
    assert found.exact_search_s == pytest.approx(2 * 120 * 120 * 4 / rate)
    flops = ivf_flops(120, 4, [(120, 1)], lists=4, probes=32)
    trained_s = training_flops(120, 4, 4) / 1e6
    assert found.ivf_search_s == pytest.approx(trained_s + flops / rate / 0.05)
    assert found.bottleneck == "backbone"
    expected = COSTS.start_s + max(max(decoding), max(backbone)) / SMALL.efficiency
    assert found.embed_s == pytest.approx(expected)
    slow = predict(replace(SMALL, cpus=1), COSTS, lists=4)
    assert slow.bottleneck == "decoding"
    assert slow.embed_s == pytest.approx(9 + 60 * 0.3 / 0.5)


def test_a_segmentation_sees_whole_images_and_its_cpus_decode_and_write_masks():
    costs = replace(COSTS, finish_s=0.2, score_bytes=11.0, mask_bytes=5.0)
    found = predict(SMALL, costs, lists=4)
    backbone_s = 60 / (3 * 4.0)
    cpus_s = 60 * (0.3 + 0.2) / 5
    assert cpus_s > backbone_s
    assert found.segment_bottleneck == "decoding and masks"
    assert found.segment_s == pytest.approx(9 + cpus_s / 0.5)
    assert found.segment_price == pytest.approx(found.segment_s / 3600 * (3 * 7 + 5 * 0.5))
    assert found.mask_bytes == 60 * 5
    assert found.segment_object_store_bytes == 60 * (30 + 11)
    many = predict(replace(SMALL, cpus=50), costs, lists=4)
    assert (many.segment_bottleneck, many.segment_s) == ("backbone", 9 + backbone_s / 0.5)


def test_sizes_and_prices_are_sums_over_views():
    found = predict(SMALL, COSTS, lists=4)
    views = SMALL.images * SMALL.crops
    assert found.feature_store_bytes == sum(50 for _ in range(views))
    assert found.embedding_bytes == sum(4 * 4 for _ in range(views))
    assert found.object_store_bytes == sum(30 + 2 * 16 for _ in range(views))
    assert found.unit_table_bytes == sum(16 + 16 for _ in range(views))
    assert found.in_flight_bytes == sum(30 for _ in range(views))  # 3 * 3 * 64 are more
    many = predict(replace(SMALL, images=1000), COSTS, lists=4)
    assert many.in_flight_bytes == sum(30 for _ in range(3 * 3 * 64))
    on_nodes = sum(COSTS.base_bytes + sum(16 for _ in range(views)) for _ in range(2))
    actors = sum(COSTS.actor_bytes for _ in range(3))
    driver = sum(16 + 16 for _ in range(views))
    assert found.memory_bytes == on_nodes + actors + driver + found.in_flight_bytes
    assert found.training_memory_bytes == sum(driver for _ in range(3))
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
    one = predict(replace(SMALL, images=2**15), COSTS, lists=4)
    assert predict(replace(SMALL, images=2**15, accelerators=6), COSTS, lists=4).exact_search_s == (
        pytest.approx(one.exact_search_s / 2)
    )
    assert predict(replace(SMALL, images=2**16), COSTS, lists=4).exact_search_s == (
        pytest.approx(one.exact_search_s * 4)
    )

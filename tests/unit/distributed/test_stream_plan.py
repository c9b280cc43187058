from __future__ import annotations

import random

import pytest

from stego_core.distributed.cluster import ActorPlan, largest_share
from stego_core.distributed.stream_plan import split


def workers_on(cpus: float, gpus: float, largest: float, count: int) -> ActorPlan:
    """As `plan_actors` plans them."""
    if gpus:
        return ActorPlan(count, num_cpus=0, num_gpus=1, threads=1)
    share = largest_share([largest] * round(cpus / largest), count)
    return ActorPlan(count, num_cpus=share, num_gpus=0, threads=int(min(cpus / count, largest)))


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    ("nodes", "node_cpus"), [(1, 1), (1, 2), (1, 16), (4, 16), (3, 7), (4, 2), (4, 4), (6, 8)]
)
def test_on_cpus_everything_fits_and_most_of_the_cluster_computes_features(
    workers: int, nodes: int, node_cpus: int
) -> None:
    cpus = nodes * node_cpus
    alone = workers_on(cpus, 0, node_cpus, workers)
    plan = split(alone, nodes=[node_cpus] * nodes, gpus=0)
    backbones = plan.backbone.count * plan.backbone.num_cpus
    readers = plan.fetch_tasks * plan.fetch_cpus
    assert workers * (plan.worker.num_cpus + backbones + readers) <= cpus
    assert plan.fetch_cpus > 0
    assert plan.worker.threads == alone.threads
    if cpus / workers >= 8:
        assert workers * backbones >= 0.8 * (cpus - nodes * max(1, node_cpus / 10))


@pytest.mark.parametrize("seed", range(100))
def test_wherever_actors_are_placed_each_has_a_place_and_a_task_that_reads_too(seed: int) -> None:
    generator = random.Random(seed)
    kinds = generator.choice([[1], [2], [4, 8], [1, 2, 3, 7, 16, 64]])
    nodes = [float(generator.choice(kinds)) for _ in range(generator.randint(1, 6))]
    workers = generator.randint(1, 3)
    alone = ActorPlan(
        workers, num_cpus=largest_share(nodes, workers), num_gpus=0, threads=generator.randint(1, 4)
    )
    plan = split(alone, nodes=nodes, gpus=0)
    assert plan.backbone.threads <= max(nodes)
    for _ in range(10):
        left = list(nodes)
        for _ in range(workers):  # Ray Train takes a hundredth for each
            left[generator.choice([n for n, free in enumerate(left) if free >= 0.01])] -= 0.01
        for _ in range(workers * plan.backbone.count):
            size = plan.backbone.num_cpus
            left[generator.choice([n for n, free in enumerate(left) if free >= size])] -= size
        assert max(left) >= plan.fetch_cpus > 0


@pytest.mark.parametrize(("gpus", "workers"), [(1, 1), (4, 1), (4, 2), (8, 8)])
def test_on_gpus_no_two_workers_share_one_and_each_gpu_has_a_backbone(
    gpus: int, workers: int
) -> None:
    plan = split(workers_on(16, gpus, 16, workers), nodes=[16], gpus=gpus)
    assert plan.worker.num_gpus > 0.5
    assert plan.worker.num_gpus + plan.backbone.num_gpus <= 1
    assert workers * plan.backbone.count == gpus
    assert plan.backbone.num_cpus == 0
    assert workers * plan.fetch_tasks * plan.fetch_cpus <= 16


def test_more_threads_have_more_views_ahead_of_them() -> None:
    small, large = (split(workers_on(c, 0, c, 1), nodes=[c], gpus=0).views_ahead for c in (2, 32))
    assert (small, large) == (64, 512)

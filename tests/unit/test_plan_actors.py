"""What an actor takes of a cluster, and what follows from it, without a cluster or a GPU."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from stego_core.config.schema import TrainJob
from stego_core.distributed import train, units
from stego_core.distributed.cluster import ActorPlan, largest_share, plan_actors
from stego_core.distributed.stream_plan import plan_stream
from stego_core.errors import ClusterError


def give(monkeypatch: pytest.MonkeyPatch, **resources: float) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources}])


def test_a_plan_with_gpus_runs_on_cuda_and_talks_by_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, CPU=16, GPU=2)
    plan = plan_actors(2)
    assert (plan.num_gpus, plan.device, plan.collectives) == (1, "cuda", "nccl")
    with pytest.raises(ClusterError, match="3 actors"):
        plan_actors(3)
    assert plan_actors(3, at_least=1).count == 2
    with pytest.raises(ClusterError, match="4 actors"):
        plan_actors(4, at_least=3)


def test_without_a_number_each_gpu_has_an_actor_or_each_node_with_room_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    give(monkeypatch, CPU=16, GPU=4)
    assert plan_actors(0).count == 4
    give(monkeypatch, CPU=16, GPU=0.5)
    with pytest.raises(ClusterError, match="1 actors want a GPU each"):
        plan_actors(0)
    give(monkeypatch, CPU=8)
    assert plan_actors(0) == plan_actors(1)
    for cpus, count in ([8, 8, 64], 3), ([0, 1, 8, 8], 2), ([1], 1), ([1, 1], 1):
        nodes = [{"Alive": True, "Resources": {"CPU": float(cpu)}} for cpu in cpus]
        monkeypatch.setattr(ray, "nodes", lambda nodes=nodes: nodes)
        monkeypatch.setattr(ray, "cluster_resources", lambda cpus=cpus: {"CPU": float(sum(cpus))})
        assert plan_actors(0).count == count


def test_a_plan_without_gpus_runs_on_cpus_and_talks_by_gloo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    give(monkeypatch, CPU=16)
    plan = plan_actors(2)
    assert (plan.num_gpus, plan.device, plan.collectives) == (0, "cpu", "gloo")
    assert 2 * plan.num_cpus <= 16 - 1.6


def first_fit(nodes: list[float], size: float, count: int, generator: random.Random) -> list[float]:
    """Place actors on nodes drawn among those with room; return what is left of each node."""
    left = list(nodes)
    for _ in range(count):
        node = generator.choice([n for n, free in enumerate(left) if free >= size])
        left[node] -= size
    return left


@pytest.mark.parametrize("seed", range(200))
def test_wherever_actors_are_placed_each_has_a_place_and_a_task_still_finds_a_cpu(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(seed)
    sizes = generator.choice([[1, 2], [2], [4, 8], [1, 2, 3, 7, 16, 64]])
    nodes = [float(generator.choice([0, *sizes])) for _ in range(generator.randint(0, 6))]
    nodes.append(float(generator.choice(sizes)))
    alive = [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in nodes]
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": sum(nodes)})
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    count = generator.randint(1, 9)
    plan = plan_actors(count)
    assert plan.threads >= 1
    for _ in range(20):
        assert max(first_fit(nodes, plan.num_cpus, count, generator)) >= 1


@pytest.mark.parametrize("seed", range(100))
def test_the_share_is_the_largest_of_those_that_have_places_for_all(seed: int) -> None:
    generator = random.Random(seed)
    nodes = [generator.choice([0, 1, 2, 3, 8, 9, 16, 64]) for _ in range(generator.randint(1, 7))]
    count = generator.randint(1, 12)
    rooms = [Fraction(cpus) - min(cpus, max(1, Fraction(cpus, 10))) for cpus in nodes]
    fitting = [
        room / parts
        for room in rooms
        for parts in range(1, count + 1)
        if room and sum(other // (room / parts) for other in rooms) >= count
    ]
    assert largest_share([float(cpus) for cpus in nodes], count) == pytest.approx(
        float(max(fitting, default=0))
    )


def test_actors_that_share_a_node_share_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [64.0] + [2.0] * 32
    alive = [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in nodes]
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": sum(nodes)})
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    assert plan_actors(2).threads == 32


def test_a_later_attempt_fits_the_nodes_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, CPU=2)
    planned = ActorPlan(2, num_cpus=0.99, num_gpus=0, threads=2)  # for two such nodes
    assert units._planned(planned, 1) == planned
    assert units._planned(planned, 2) == replace(planned, num_cpus=0.49)
    give(monkeypatch, CPU=0)
    assert units._planned(planned, 2) == planned
    on_gpus = ActorPlan(2, num_cpus=0, num_gpus=1, threads=1)
    assert units._planned(on_gpus, 2) == on_gpus


def test_a_cluster_without_a_cpu_is_refused_even_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, CPU=0, GPU=2)
    with pytest.raises(ClusterError, match="no CPU"):
        plan_actors(1)


@pytest.mark.parametrize(
    ("nodes", "count", "share"),
    [
        ([2.0], 1, 1.0),
        ([16.0], 2, 7.2),
        ([2.0] * 4, 4, 1.0),  # one a node, each with a CPU for reading beside it
        ([8.0, 8.0], 3, 3.5),  # two on one node
        ([8.0, 2.0], 2, 3.5),  # rather two on the larger node
        ([1.0, 1.0], 2, 0.0),
    ],
)
def test_actors_take_all_that_leaves_each_a_place_and_each_node_a_tenth_or_a_cpu(
    nodes: list[float], count: int, share: float
) -> None:
    assert largest_share(nodes, count) == pytest.approx(share)


class Planned(Exception):
    """Raised where Ray would start the workers."""


def fit_of(job: TrainJob, run: Any, *, is_stored: bool) -> None:
    lease: Any = SimpleNamespace(check=lambda: None)
    mined: Any = SimpleNamespace(is_stored=is_stored)
    train._fit(job, run, mined, lease, key="0")


@dataclass
class Trainer:
    seen: dict

    def __call__(self, *_, **kwargs):
        self.seen |= kwargs
        raise Planned


@pytest.mark.parametrize(("resources", "backend"), [({"GPU": 4}, "nccl"), ({}, "gloo")])
def test_training_hands_the_plans_backend_and_gpus_to_ray(
    resources, backend, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    give(monkeypatch, CPU=16, **resources)
    trainer = Trainer({})
    monkeypatch.setattr(train, "TorchTrainer", trainer)
    run = train.RunDirectory(str(tmp_path / "run"), job="train")
    with pytest.raises(Planned):
        fit_of(TrainJob(workers=2), run, is_stored=True)
    assert trainer.seen["torch_config"].backend == backend
    scaling = trainer.seen["scaling_config"]
    assert (scaling.use_gpu, scaling.num_workers) == (bool(resources), 2)
    assert scaling.placement_strategy == ("PACK" if resources else "SPREAD")
    assert trainer.seen["train_loop_config"]["device"] == ("cuda" if resources else "cpu")
    with pytest.raises(Planned):
        fit_of(TrainJob(workers=2, min_workers=1), run, is_stored=True)
    assert trainer.seen["scaling_config"].num_workers == (1, 2)


def test_a_training_without_a_store_leaves_part_of_each_gpu_to_the_backbone(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    give(monkeypatch, CPU=16, GPU=2)
    trainer = Trainer({})
    monkeypatch.setattr(train, "TorchTrainer", trainer)
    run = train.RunDirectory(str(tmp_path / "run"), job="train")
    with pytest.raises(Planned):
        fit_of(TrainJob(workers=2), run, is_stored=False)
    gpus = trainer.seen["scaling_config"].resources_per_worker["GPU"]
    backbone = plan_stream(2).backbone
    assert 0.5 < gpus <= 1 - backbone.num_gpus * backbone.count
    assert backbone.device == trainer.seen["train_loop_config"]["device"] == "cuda"
    # Fractions of a GPU are not what Ray Train counts free places by.
    with pytest.raises(Planned):
        fit_of(TrainJob(workers=2, min_workers=1), run, is_stored=False)
    assert trainer.seen["scaling_config"].num_workers == 2

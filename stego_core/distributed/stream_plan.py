"""How a cluster is shared by training workers and the backbone that streams features to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stego_core.distributed.cluster import (
    ActorPlan,
    node_cpus,
    places,
    plan_actors,
    spare_cpus,
    total,
)

# A worker has more than half of its GPU, so that no two are on one (NCCL refuses that), and the
# backbone the rest: the step of head and loss leaves a GPU idle most of the time.
_WORKER_GPU, _BACKBONE_GPU = 0.51, 0.49
_WORKER_CPU = 0.1  # of a worker's share, which its own steps need
_BATCHES_AHEAD = 2  # for each thread of an actor: one in work, one ready
_LEAST_AHEAD = 64  # views for each actor, so that a GPU has work
_BATCH = 8  # views of one forward pass


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """Who computes what while features stream.

    Attributes:
        worker: the training workers.
        backbone: the actors that compute features for one worker.
        fetch_tasks: tasks at a time that read and decode for one worker.
        fetch_cpus: of each of these.
    """

    worker: ActorPlan
    backbone: ActorPlan
    fetch_tasks: int
    fetch_cpus: float

    @property
    def views_ahead(self) -> int:
        """Return how many views of a worker are between being read and being used."""
        each = max(_LEAST_AHEAD, _BATCHES_AHEAD * _BATCH * self.backbone.threads)
        return self.backbone.count * each


def plan_stream(workers: int) -> StreamPlan:
    """Return the plan for so many training workers on the cluster.

    Raises:
        ClusterError: as `plan_actors`.
    """
    return split(plan_actors(workers), nodes=node_cpus(), gpus=total("GPU"))


def split(workers: ActorPlan, *, nodes: Sequence[float], gpus: float) -> StreamPlan:
    """Split what workers would have alone, and all that is idle, between them and a backbone.

    On GPUs there is a backbone actor for each GPU, and all CPUs read. On CPUs the actors share
    what reading leaves, in pieces that fit on the nodes (see `largest_share`).

    Args:
        workers: as without a stream. They keep their threads, and so the order of their sums.
        nodes: CPUs of each node.
        gpus: of the cluster.
    """
    cpus = sum(nodes)
    if workers.num_gpus:
        count = max(1, int(gpus // workers.count))
        free = cpus / workers.count
        backbone = ActorPlan(count, num_cpus=0, num_gpus=_BACKBONE_GPU, threads=1)
        worker = replace(workers, num_gpus=_WORKER_GPU)
    else:
        spare = sum(map(spare_cpus, nodes))
        free = spare / workers.count
        share = (cpus - spare) / workers.count * (1 - _WORKER_CPU)
        count = 1
        while share and places(nodes, share / count) < workers.count * count:
            count += 1
        threads = max(1, math.floor(min(cpus / (workers.count * count), max(nodes))))
        backbone = ActorPlan(count, num_cpus=_floor(share / count), num_gpus=0, threads=threads)
        worker = replace(workers, num_cpus=0)  # where it is matters, not what it reserves
    tasks = max(1, math.floor(free))
    # No more than the CPU that some node has left.
    fetch_cpus = _floor(min(1.0, free / tasks))
    return StreamPlan(worker, backbone, fetch_tasks=tasks, fetch_cpus=fetch_cpus)


def _floor(cpus: float) -> float:
    # A hundredth less than a whole CPU, so that Ray does not fuse stages.
    return max(0.0, math.floor(min(cpus, 1e6) * 100 - 1) / 100)

"""Workers that share a batch must train like one worker: the same losses, the same weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from factories import FolderContext, train_data, train_job

from stego_core.config.compat import TrainCompat
from stego_core.training.loop import train

# Measured: 1.5e-8 at most after five steps; sums over workers are added in another order.
TOLERANCE = 1e-5
# Attention doesn't depend on the bias of its keys: that bias follows the rounding of its gradient.
NO_EFFECT = "in_proj_bias"
WORKERS = 2


def job_of(*, head=None, **loss):
    return train_job(train={"steps": 5, "head_lr": 5e-4}, loss=loss, head=head)


CONCEPTS = torch.randn(5, 8, generator=torch.Generator().manual_seed(9))


def trained(folder, rank, num_workers, job):
    context = FolderContext(folder, rank=rank, num_workers=num_workers)
    concepts = CONCEPTS if job.loss.energy == "concept" else None
    data = train_data(labels=True, concepts=concepts)
    model = train(job, data, context, device="cpu")
    return model.state_dict(), context.events


def work(rank, folder, jobs):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORKERS
    )
    try:
        found = []
        for number, job in enumerate(jobs):
            path = folder / f"run-{number}"
            path.mkdir(exist_ok=True)
            found.append(trained(path, rank, WORKERS, job))
            dist.barrier()
        torch.save(found, folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


JOBS = [
    job_of(),
    job_of(pointwise=False, zero_clamp=False),
    job_of(reconstruction=0.5),
    job_of(shifts="adaptive"),
    job_of(energy="smooth"),
    job_of(local=0.5),
    job_of(head={"kind": "transformer"}),
    job_of(energy="concept"),
]
# The one switch that is meant to make a run depend on the number of workers.
WORKER_MEAN = dataclasses.replace(job_of(), compat=TrainCompat(worker_mean=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """For every job the states of both workers and of a single one."""
    folder = tmp_path_factory.mktemp("workers")
    jobs = [*JOBS, WORKER_MEAN]
    mp.spawn(work, args=(folder, jobs), nprocs=WORKERS)
    ranks = [torch.load(folder / f"rank-{rank}.pt") for rank in range(WORKERS)]
    single = []
    for number, job in enumerate(jobs):
        path = folder / f"single-{number}"
        path.mkdir()
        single.append(trained(path, 0, 1, job))
    return ranks, single


@pytest.mark.parametrize("number", range(len(JOBS)))
def test_two_workers_train_the_weights_that_one_trains(runs, number):
    ranks, single = runs
    expected, _ = single[number]
    for rank in ranks:
        state, _ = rank[number]
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            differences = (state[name] - value).abs()
            if name.endswith(NO_EFFECT):
                queries, _, values = differences.chunk(3)
                differences = torch.cat([queries, values])
            assert differences.max().item() < TOLERANCE, name


@pytest.mark.parametrize("number", range(len(JOBS)))
def test_the_workers_agree_to_the_last_bit(runs, number):
    (first, _), (second, _) = (rank[number] for rank in runs[0])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_with_the_mean_of_each_worker_two_workers_train_other_weights(runs):
    ranks, single = runs
    (state, _), (expected, _) = ranks[0][len(JOBS)], single[len(JOBS)]
    assert (state["head.linear.weight"] - expected["head.linear.weight"]).abs().max() > TOLERANCE
    # One worker's mean is the mean of the batch.
    plain, _ = single[0]
    assert all(torch.equal(plain[name], expected[name]) for name in plain)


def test_the_weights_have_moved_far_more_than_the_tolerance(runs):
    from stego_core.training.step import Trainable

    start = Trainable(JOBS[0], channels=8, num_classes=2, shifts={}).state_dict()
    end, _ = runs[1][0]
    assert all((end[name] - start[name]).abs().max() > 100 * TOLERANCE for name in start)

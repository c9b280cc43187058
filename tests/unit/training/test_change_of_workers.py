"""A training that dies and goes on with another number of workers sees the same batches."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from factories import FolderContext, Killed, train_data, train_job

from stego_core.training.loop import train

# Measured: 1.5e-8 at most after eight steps; sums over workers are added in another order.
TOLERANCE = 1e-5
STEPS = 8
JOB = train_job(train={"steps": STEPS, "head_lr": 5e-4, "checkpoint_every": 1})


def run(folder, *, rank=0, num_workers=1, dies_at=None):
    """Train until the end, or until all workers die; return the weights and the events."""
    context = FolderContext(folder, rank=rank, num_workers=num_workers, dies_at=dies_at)
    try:
        state = train(JOB, train_data(labels=True), context, device="cpu").state_dict()
    except Killed:
        state = None
    return state, context.events


def work(rank, folder, note, dies_at):
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet-{note}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    try:
        found = run(folder / "run", rank=rank, num_workers=2, dies_at=dies_at)
        dist.barrier()
        if rank == 0:
            torch.save(found, folder / note)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What an undisturbed worker gives, and two workers, then one, then two."""
    folder = tmp_path_factory.mktemp("changing")
    (folder / "run").mkdir()
    (folder / "calm").mkdir()
    calm = run(folder / "calm")
    mp.spawn(work, args=(folder, "first", 3), nprocs=2)
    second = run(folder / "run", dies_at=6)
    mp.spawn(work, args=(folder, "third", None), nprocs=2)
    parts = [torch.load(folder / "first"), second, torch.load(folder / "third")]
    return calm, parts


def batches(events):
    return {event["step"]: event["batch"] for event in events if event["event"] == "train/step"}


def test_every_step_has_the_batch_of_an_undisturbed_run(found):
    (_, calm), parts = found
    (_, first), (_, second), (_, third) = parts
    assert len(set(batches(calm).values())) == STEPS
    resumed = [e for e in second + third if e["event"] == "train/resumed"]
    # Each dies before the checkpoint of the step that it was at.
    assert [(event["step"], event["workers"]) for event in resumed] == [(2, 1), (5, 2)]
    assert batches(first) | batches(second) | batches(third) == batches(calm)
    assert {step: batches(calm)[step] for step in batches(second)} == batches(second)


def test_the_weights_are_those_of_an_undisturbed_run_but_for_rounding(found):
    (expected, _), parts = found
    state = parts[-1][0]
    assert state.keys() == expected.keys()
    assert all((state[k] - expected[k]).abs().max().item() < TOLERANCE for k in expected)

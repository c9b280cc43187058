"""Clusters refined over all tokens: against a written-down Lloyd step, and by several workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from factories import (
    FakeFeatures,
    FolderContext,
    block_field,
    ring_neighbors,
    train_data,
    train_job,
)

from stego_core.model.objectness import balance_background, find_objectness
from stego_core.training.loop import LocalContext
from stego_core.training.refine import refine_clusters

VIEWS = 70  # more than two blocks
START = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def field(num_views=VIEWS):
    maps, _ = block_field(num_views, noise=0.3)
    return maps


def data_of(maps):
    views = len(maps)
    return train_data(views, features=FakeFeatures(maps), neighbors=ring_neighbors(views))


def refined(maps, *, passes, start=START, context=None, **clusters):
    # Every token is in the sample, so that the weights can be written down.
    job = train_job(clusters={"passes": passes, "sample": 10**6, **clusters})
    context = context or LocalContext()
    return refine_clusters(job, start, lambda maps: maps, data_of(maps), context, device="cpu")


def all_tokens(maps):
    return torch.from_numpy(maps).float().permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def written_down(maps, start, passes, share):
    tokens = all_tokens(maps)
    height, width = maps.shape[2:]
    down, across = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None]
    pull = -(down**2 + across**2).expand(len(maps), height, width).flatten()
    objectness = find_objectness(tokens, pull)(tokens)
    weights = balance_background(objectness, share)(objectness).double()
    unit, clusters = F.normalize(tokens.double(), dim=1), F.normalize(start.double(), dim=1)
    for _ in range(passes):
        nearest = (unit @ clusters.T).argmax(1)
        for number in range(len(clusters)):
            mine = nearest == number
            if mine.any():
                clusters[number] = F.normalize((unit * weights[:, None])[mine].sum(0), dim=0)
    return clusters


@pytest.mark.parametrize("share", [1.0, 0.1])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_pass_moves_each_cluster_to_the_weighted_mean_of_its_tokens(passes, share):
    maps = field()
    found = refined(maps, passes=passes, background=share)
    expected = written_down(maps, START, passes, share)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_the_mean_cosine_rises_with_each_pass():
    context = LocalContext()
    refined(field(), passes=4, background=1.0, context=context)
    cosines = [e["mean_cosine"] for e in context.events if e["event"] == "clusters/pass"]
    assert len(cosines) == 4
    assert cosines == sorted(cosines)
    assert cosines[-1] > cosines[0]


def test_clusters_of_a_poor_sample_end_at_the_planted_directions():
    maps, directions = (
        block_field(VIEWS, noise=0.05)[0],
        np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0][:3],
    )
    start = torch.from_numpy(directions + 0.4 * np.random.default_rng(1).normal(size=(3, 8)))
    found = refined(maps, passes=3, start=start.float(), background=1.0).numpy()
    assert (np.abs(found @ directions.T).max(0) > 0.999).all()


def test_a_cluster_without_tokens_and_codes_without_length_stay_out():
    maps = field(6)
    maps[0] = 0
    context, without = LocalContext(), LocalContext()
    refined(maps, passes=1, background=1.0, context=context)
    refined(maps[1:], passes=1, background=1.0, context=without)
    assert context.events[-1]["mean_cosine"] == without.events[-1]["mean_cosine"]
    away = torch.cat([START, -10 * all_tokens(maps).mean(0, keepdim=True)])
    found = refined(maps, passes=1, start=away, background=1.0)
    assert torch.isfinite(found).all()
    nearest = (F.normalize(all_tokens(maps), dim=1) @ F.normalize(away, dim=1).T).argmax(1)
    lonely = sorted(set(range(5)) - set(nearest[36:].tolist()))
    assert lonely
    torch.testing.assert_close(found[lonely], F.normalize(away, dim=1)[lonely])


def test_no_pass_moves_nothing():
    torch.testing.assert_close(refined(field(), passes=0), F.normalize(START, dim=1))


def work(rank, folder, workers):
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet-{workers}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=workers)
    try:
        context = FolderContext(folder, rank=rank, num_workers=workers)
        torch.save(refined(field(), passes=3, context=context), folder / f"{workers}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_finds_the_same_bits(tmp_path, workers):
    mp.spawn(work, args=(tmp_path, workers), nprocs=workers)
    alone = refined(field(), passes=3)
    for rank in range(workers):
        assert torch.equal(torch.load(tmp_path / f"{workers}-{rank}.pt"), alone)


def test_a_worker_reads_its_own_share_once_in_each_pass():
    maps = field()
    data = data_of(maps)
    context = LocalContext()
    context.rank, context.num_workers = 1, 2
    job = train_job(clusters={"passes": 2, "sample": 10})
    refine_clusters(job, START, lambda maps: maps, data, context, device="cpu")
    shares = [list(read) for read in data.features.reads if len(read) > 1]
    assert shares[-2:] == [list(range(32, 64))] * 2

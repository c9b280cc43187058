"""Options of the clusters: refitting by modularity, merging, and choosing their number."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import FakeFeatures, FolderContext, ring_neighbors, train_data, train_job

from stego_core.config.load import load_job
from stego_core.config.schema import TrainJob
from stego_core.distributed.train import plan_train
from stego_core.errors import ConfigError
from stego_core.model.head import Head
from stego_core.model.merging import strongest_products
from stego_core.neighbors.search import NONE
from stego_core.training.choose import with_cluster_count
from stego_core.training.fit import fit
from stego_core.training.loop import LocalContext, train
from stego_core.training.step import Trainable


def field(num_views=12, noise=0.05, count=3):
    """Maps whose cells gather around planted directions, and the direction of each cell."""
    generator = np.random.default_rng(0)
    directions = np.linalg.qr(generator.normal(size=(8, 8)))[0][:count]
    owner = generator.integers(0, count, (num_views, 5, 4))
    maps = directions[owner] + noise * generator.normal(size=(*owner.shape, 8))
    return maps.transpose(0, 3, 1, 2), owner


def data_of(maps):
    return train_data(len(maps), features=FakeFeatures(maps), neighbors=ring_neighbors(len(maps)))


def fitted(**clusters):
    maps, owner = field()
    job = train_job(head={"kind": "linear", "smooth": 0.0}, clusters={"restarts": 6, **clusters})
    model = Trainable(job, channels=8, num_classes=0, shifts={}).eval()
    tensors = fit(job, model, data_of(maps))
    head = Head(8, job.head)
    head.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("head.")})
    with torch.no_grad():
        code = F.normalize(head(torch.from_numpy(maps).float()), dim=1)
    products = torch.einsum("bkhw,nk->bnhw", code, F.normalize(tensors["clusters"], dim=1))
    if "merge" in tensors:
        products = strongest_products(products, tensors["merge"])
    return tensors, products.argmax(1).numpy(), owner


def share(found, owner):
    table = np.zeros((3, 3), int)
    np.add.at(table, (found, owner), 1)
    return table.max(1).sum() / owner.size if len({*table.argmax(1)}) == 3 else 0.0


@pytest.mark.parametrize(
    "clusters", [{"refit": "modularity"}, {"over": 3}, {"refit": "modularity", "over": 2}]
)
def test_the_planted_clusters_are_found(clusters):
    tensors, found, owner = fitted(**clusters)
    assert share(found, owner) >= 0.97
    over = clusters.get("over", 1)
    assert len(tensors["clusters"]) == 3 * over
    assert ("merge" in tensors) == (over > 1)


def test_modularity_gives_other_clusters_than_kmeans():
    by_graph, by_means = fitted(refit="modularity")[0], fitted()[0]
    assert not torch.allclose(by_graph["clusters"], by_means["clusters"], atol=1e-3)
    assert torch.equal(by_graph["baseline"], by_means["baseline"])


def test_merging_what_sgd_trained_is_refused():
    argv = ["--clusters.over", "2", "--clusters.refit", "none"]
    with pytest.raises(ConfigError, match="can't be merged"):
        load_job(TrainJob, argv, prog="x")


def planted(alpha):
    """Train only the probe, one of whose vectors starts where no code is nearest to it.

    Codes are features: three directions. Two vectors start near the first and the second, the last
    at a right angle to all three; the third direction is a little nearer to the first vector.
    """
    maps, owner = field(noise=0.0)
    job = train_job(
        head={"kind": "none", "dropout": 0.0},
        train={"steps": 300, "batch": 12, "checkpoint_every": 300},
        clusters={"alpha": alpha, "refit": "none"},
    )
    directions = [maps.transpose(0, 2, 3, 1)[owner == number][0] for number in range(3)]
    away = np.linalg.svd(np.stack(directions))[2][3]
    start = np.stack([directions[0] + 0.1 * directions[2], directions[1], away])

    def place(step, model):
        model.cluster_probe.clusters.data.copy_(torch.from_numpy(start))

    model = train(job, data_of(maps), LocalContext(), device="cpu", visit=place)
    clusters = fit(job, model, data_of(maps))["clusters"]
    directions = torch.from_numpy(np.stack(directions)).float()
    return torch.from_numpy(start).float(), clusters, F.normalize(clusters, dim=1) @ directions.T


def test_a_soft_assignment_finds_the_cluster_that_a_hard_one_never_moves():
    start, hard, _ = planted(None)
    assert torch.equal(hard[2], start[2])
    _, _, cosines = planted(2.0)
    assert cosines.argmax(1).tolist() == [0, 1, 2]
    assert cosines.diagonal().min() > 0.9


def test_a_refit_does_not_start_from_what_sgd_trained():
    maps, _ = field()
    job = train_job()
    model = Trainable(job, channels=8, num_classes=0, shifts={}).eval()
    first = fit(job, model, data_of(maps))["clusters"]
    model.cluster_probe.clusters.data.neg_()
    assert torch.equal(fit(job, model, data_of(maps))["clusters"], first)


@pytest.mark.parametrize("argv", [[], ["--clusters.refit", "none", "--loss.energy", "smooth"]])
def test_a_soft_assignment_that_would_change_nothing_is_refused(argv):
    with pytest.raises(ConfigError, match=r"clusters\.alpha"):
        load_job(TrainJob, ["--clusters.alpha", "2", *argv], prog="x")


@pytest.mark.parametrize(
    "argv", [["--clusters.refit", "modularity"], ["--clusters.boost", "primaps"]]
)
def test_passes_go_with_clusters_of_kmeans_alone(argv):
    with pytest.raises(ConfigError, match=r"clusters\.passes"):
        load_job(TrainJob, ["--clusters.passes", "2", *argv], prog="x")


@pytest.mark.parametrize("extra", [0, 2])
def test_the_number_of_clusters_is_chosen_and_told(extra, caplog):
    maps, _ = field(30, count=4)
    job = train_job(head={"smooth": 0.0}, clusters={"count": 0, "extra": extra, "sample": 400})
    context = LocalContext()
    with caplog.at_level(logging.INFO):
        found = with_cluster_count(job, data_of(maps), context)
    assert found.clusters.count == 4
    assert found.clusters.total == 4 + extra
    (event,) = context.events
    assert event["event"] == "clusters/count"
    assert event["count"] == 4
    scores = {row["count"]: row["agreement"] for row in event["candidates"]}
    assert scores[4] > 0.98 > scores[6]
    assert "4 chosen" in caplog.text


def test_without_consistency_the_number_is_chosen_by_the_silhouette():
    maps, _ = field(30, count=4)
    job = train_job(head={"smooth": 0.0, "consistent": False}, clusters={"count": 0, "sample": 400})
    context = LocalContext()
    assert with_cluster_count(job, data_of(maps), context).clusters.count == 4
    scores = {row["count"]: row["silhouette"] for row in context.events[0]["candidates"]}
    assert max(scores, key=scores.get) == 4


def test_without_neighbours_nothing_matches_and_the_silhouette_chooses():
    maps, _ = field(30, count=4)
    data = train_data(30, features=FakeFeatures(maps), neighbors=np.full((30, 3), NONE))
    job = train_job(head={"smooth": 0.0}, clusters={"count": 0, "sample": 400})
    context = LocalContext()
    assert with_cluster_count(job, data, context).clusters.count == 4
    assert "silhouette" in context.events[0]["candidates"][0]


def test_a_given_number_of_clusters_reads_nothing():
    data, context = data_of(field()[0]), LocalContext()
    job = train_job()
    assert with_cluster_count(job, data, context) is job
    assert data.features.reads == context.events == []


def test_a_run_that_goes_on_keeps_its_number_of_clusters(tmp_path):
    maps, _ = field(30, count=4)
    job = train_job(clusters={"count": 5, "extra": 1})
    train(job, data_of(maps), FolderContext(tmp_path), device="cpu")
    unset, context = train_job(clusters={"count": 0, "extra": 1}), FolderContext(tmp_path)
    assert with_cluster_count(unset, data_of(maps), context).clusters.count == 5
    assert context.events == []


def test_the_plan_says_how_the_number_will_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr("stego_core.distributed.train.plan_mine", lambda job: [])
    job = train_job(out=str(tmp_path), clusters={"count": 0})
    assert "clusters chosen from 2, 3, 4" in plan_train(job)[-1]
    assert "27 clusters" in plan_train(train_job(out=str(tmp_path), clusters={"count": 27}))[-1]

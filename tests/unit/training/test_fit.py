from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import FakeFeatures, ring_neighbors, states_equal, train_data, train_job

from stego_core.model.head import Head
from stego_core.model.smoothing import smooth_code
from stego_core.training.fit import fit
from stego_core.training.loop import LocalContext, train
from stego_core.training.maps import sample_tokens
from stego_core.training.step import Trainable

DIRECTIONS = np.linalg.qr(np.random.default_rng(3).normal(size=(8, 8)))[0][:3]


def field(num_views=12, noise=0.05):
    """Maps whose cells gather around three directions; returns maps and the direction of each."""
    generator = np.random.default_rng(0)
    owner = generator.integers(0, 3, (num_views, 5, 4))
    maps = DIRECTIONS[owner] * generator.uniform(0.5, 2, (*owner.shape, 1))
    maps = maps + noise * generator.normal(size=maps.shape)
    return maps.transpose(0, 3, 1, 2), owner


def data_of(maps, **changes):
    neighbors = ring_neighbors(len(maps))
    return train_data(
        len(maps), **{"features": FakeFeatures(maps), "neighbors": neighbors, **changes}
    )


def model_of(job, num_classes=0):
    return Trainable(job, channels=8, num_classes=num_classes, shifts={}).eval()


def code_of(job, tensors, features):
    """The code that the head of a model file computes."""
    head = Head(8, job.head)
    prefix = "head."
    head.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    with torch.no_grad():
        return head(features)


def agree(labels, truth):
    """Whether two labellings are the same up to names."""
    pairs = {*zip(labels.ravel().tolist(), truth.ravel().tolist(), strict=True)}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == 3


def test_the_clusters_of_codes_and_of_features_are_the_planted_ones():
    maps, owner = field()
    job = train_job(head={"kind": "linear"}, clusters={"restarts": 6})
    model = model_of(job)
    tensors = fit(job, model, data_of(maps))
    features = torch.from_numpy(maps).float()
    code = smooth_code(code_of(job, tensors, features), features, temperature=job.head.smooth)
    by_feature = torch.einsum("bchw,nc->bnhw", features, tensors["baseline"]).argmax(1)
    by_code = torch.einsum("bkhw,nk->bnhw", F.normalize(code, dim=1), tensors["clusters"]).argmax(1)
    assert agree(by_feature.numpy(), owner)
    assert agree(by_code.numpy(), owner)
    cosines = (tensors["baseline"].numpy() @ DIRECTIONS.T).max(1)
    assert (cosines > 0.99).all()


def test_the_codes_of_the_fitted_head_are_white_and_its_linear_probe_scores_as_before():
    maps, _ = field(60, noise=0.4)
    features = torch.from_numpy(maps).float()
    job = train_job(
        clusters={"sample": 10**6}, head={"consistent": False}, train={"linear_refit": False}
    )
    model = model_of(job, num_classes=4)
    tensors = fit(job, model, data_of(maps))
    code = code_of(job, tensors, features).transpose(0, 1).flatten(1)
    torch.testing.assert_close(code.mean(1), torch.zeros(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.cov(code, correction=0), torch.eye(6), atol=5e-3, rtol=0)
    with torch.no_grad():
        expected = model.linear_probe.classifier(model.head(features))
    weight, bias = tensors["linear.weight"], tensors["linear.bias"]
    found = (weight @ code + bias[:, None]).unflatten(1, (60, 5, 4)).transpose(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_fewer_tokens_than_code_channels_still_give_a_model():
    maps = field(1)[0][:, :, :2, :2]
    tensors = fit(train_job(), model_of(train_job(), 2), data_of(maps, neighbors=np.array([[-1]])))
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_without_refitting_the_clusters_are_those_of_the_probe():
    job = train_job(clusters={"refit": "none"})
    model = model_of(job)
    tensors = fit(job, model, data_of(field()[0]))
    assert torch.equal(tensors["clusters"], model.cluster_probe.clusters)


@pytest.mark.parametrize("num_classes", [0, 2])
def test_the_tensors_are_all_that_a_model_file_needs(num_classes):
    job = train_job()
    model = model_of(job, num_classes)
    tensors = fit(job, model, data_of(field()[0]))
    names = {f"head.{name}" for name in model.head.state_dict()} | {"clusters", "baseline"}
    names |= {"linear.weight", "linear.bias"} if num_classes else set()
    assert set(tensors) == names
    assert tensors["clusters"].shape == (3, 6)
    assert tensors["baseline"].shape == (3, 8)
    assert not any(tensor.requires_grad for tensor in tensors.values())
    if num_classes:
        assert tensors["linear.weight"].shape == (2, 6)


def test_fitting_twice_gives_the_same_tensors():
    job, maps = train_job(), field()[0]
    first, second = (fit(job, model_of(job), data_of(maps)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tokens_are_cells_of_the_maps_and_none_is_drawn_twice():
    # Every cell holds its own number.
    maps = np.arange(12 * 20, dtype=np.float64).reshape(12, 1, 5, 4) + 1
    tokens = sample_tokens(FakeFeatures(maps), 12, 100, seed=0)[:, 0].tolist()
    assert 100 <= len(tokens) <= 120
    assert len(set(tokens)) == len(tokens)
    assert set(tokens) <= set(range(1, 241))


def test_the_drawn_tokens_depend_on_the_seed_alone_and_stop_at_all_cells():
    maps = np.arange(12 * 20, dtype=np.float64).reshape(12, 1, 5, 4)
    first = sample_tokens(FakeFeatures(maps), 12, 60, seed=0)
    assert torch.equal(first, sample_tokens(FakeFeatures(maps), 12, 60, seed=0))
    assert not torch.equal(first, sample_tokens(FakeFeatures(maps), 12, 60, seed=1))
    everything = sample_tokens(FakeFeatures(maps), 12, 10**6, seed=0)
    assert sorted(everything[:, 0].tolist()) == list(range(240))


@pytest.mark.parametrize("refit", ["kmeans", "none"])
def test_extra_clusters_are_fitted_like_the_others(refit):
    job = train_job(clusters={"count": 3, "extra": 2, "refit": refit})
    tensors = fit(job, model_of(job), data_of(field(noise=0.4)[0]))
    assert tensors["clusters"].shape == (5, 6)
    assert tensors["baseline"].shape == (5, 8)
    assert len(torch.unique(tensors["clusters"], dim=0)) == 5


def test_without_a_head_the_model_holds_the_features_own_clusters():
    job = train_job(head={"kind": "none"}, clusters={"refit": "none"})
    model = model_of(job, num_classes=2)
    maps = field()[0]
    tensors = fit(job, model, data_of(maps))
    features = torch.from_numpy(maps).float()
    assert torch.equal(code_of(job, tensors, features), features)
    assert tensors["clusters"].shape == (3, 8)
    assert tensors["linear.weight"].shape == (2, 8)


def test_without_a_head_training_moves_the_probes_only():
    job = train_job(head={"kind": "none"})
    start = model_of(job, num_classes=2)
    trained = train(job, train_data(labels=True), LocalContext(), device="cpu")
    assert states_equal(start.head, trained.head)
    assert not states_equal(start.cluster_probe, trained.cluster_probe)
    assert not states_equal(start.linear_probe, trained.linear_probe)

"""The options of the method in a training: what they change, and that they are nothing when off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import (
    FakeFeatures,
    FolderContext,
    Killed,
    block_field,
    random_maps,
    ring_neighbors,
    states_equal,
    train_data,
    train_job,
)
from reference import options_reference as reference

from stego_core.config.load import load_job
from stego_core.config.schema import TrainJob
from stego_core.errors import ConfigError
from stego_core.loss.correspondence import correspondence_loss, sample_points
from stego_core.loss.local_positives import mix_neighbors
from stego_core.training.ema import MovingAverage
from stego_core.training.fit import fit
from stego_core.training.loop import LocalContext, train
from stego_core.training.sampler import draw_step
from stego_core.training.step import StepBatch, Trainable

OPTIONS = {
    "ema": {"train": {"ema": 0.9}},
    "smooth": {"loss": {"energy": "smooth"}},
    "adaptive": {"loss": {"shifts": "adaptive"}},
    "local": {"loss": {"local": 0.5}},
    "transformer": {"head": {"kind": "transformer"}},
}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def batch_of(job):
    draws = draw_step(job, 3, neighbors_VN=ring_neighbors(9), channels=8)
    maps = torch.from_numpy(random_maps(9)).float()
    rows = slice(0, job.train.batch)
    return StepBatch(maps[draws.anchors], maps[draws.neighbors], draws, rows, None)


def model_of(job):
    return Trainable(job, channels=8, num_classes=0, shifts={})


def sampled(model, batch):
    """Features and codes of anchor, neighbour and first partner, at their points."""
    draws, keep = batch.draws, batch.draws.keep
    code = model.head(batch.anchor, (keep[0, 0], keep[0, 1]))
    code_knn = model.head(batch.neighbor, (keep[1, 0], keep[1, 1]))
    teacher, teacher_knn = batch.anchor * keep[0, 2], batch.neighbor * keep[1, 2]
    partner = draws.partners[0]
    triples = [(teacher, code), (teacher_knn, code_knn), (teacher[partner], code[partner])]
    coords = [draws.coords_anchor, draws.coords_other, draws.coords_other]
    return [
        tuple(sample_points(one, where) for one in maps)
        for maps, where in zip(triples, coords, strict=True)
    ]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("at", [3, 4])
def test_a_run_that_was_killed_ends_like_one_that_was_not(tmp_path, option, at):
    job = train_job(**OPTIONS[option])
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = train(job, train_data(), FolderContext(tmp_path / "whole"), device="cpu")
    with pytest.raises(Killed):
        train(job, train_data(), FolderContext(tmp_path / "parts", dies_at=at), device="cpu")
    resumed = train(job, train_data(), FolderContext(tmp_path / "parts"), device="cpu")
    assert states_equal(whole, resumed)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_change_neither_the_draws_nor_the_first_weights(option):
    plain, job = train_job(), train_job(**OPTIONS[option])
    first, second = (
        draw_step(one, 2, neighbors_VN=ring_neighbors(9), channels=8) for one in (plain, job)
    )
    for name in ("coords_anchor", "coords_other", "partners", "keep", "pixels"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    start, other = model_of(plain).state_dict(), model_of(job).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in start.items())
    # Without the options there is nothing more than head and probe.
    assert {name.partition(".")[0] for name in start} == {"head", "cluster_probe"}
    assert not [name for name in start if name.startswith("head.block")]


def test_a_moving_average_is_the_weighted_sum_of_what_it_followed():
    source = torch.nn.Linear(2, 1, bias=False)
    weights = [torch.tensor([[float(n), -float(n)]]) for n in (1, 2, 4)]
    source.weight.data = weights[0].clone()
    average = MovingAverage(source, 0.75)
    for weight in weights[1:]:
        source.weight.data = weight.clone()
        average.follow(source)
    expected = 0.75 * (0.75 * weights[0] + 0.25 * weights[1]) + 0.25 * weights[2]
    torch.testing.assert_close(average.shadow.weight.data, expected)
    assert not average.shadow.weight.requires_grad


def test_the_average_does_not_change_the_training_and_becomes_the_model():
    context = LocalContext()
    plain = train(train_job(clusters={"refit": "none"}), train_data(), context, device="cpu")
    job = train_job(train={"ema": 0.9}, clusters={"refit": "none"})
    model = train(job, train_data(), LocalContext(), device="cpu")
    assert states_equal(plain.head, model.head)
    assert plain.final_head is plain.head
    tensors = fit(job, model, train_data())
    assert torch.equal(tensors["head.linear.weight"], model.average.shadow.linear.weight)
    assert not torch.equal(tensors["head.linear.weight"], model.head.linear.weight)


@pytest.mark.parametrize("kind", ["self", "knn", "random"])
@pytest.mark.parametrize(("shifts", "whiten"), [("adaptive", 4), ("auto", 0)])
def test_the_losses_with_adaptive_shifts_are_those_of_the_formula(kind, shifts, whiten):
    job = train_job(
        loss={"shifts": shifts, "negatives": 1, "stabilize": True}, head={"whiten": whiten}
    )
    model, batch = model_of(job), batch_of(job)
    own, near, random = sampled(model, batch)
    (f1, c1), (f2, c2) = own, {"self": own, "knn": near, "random": random}[kind]
    shift = reference.adaptive_shift(kind, *(m.detach().numpy() for m in (f1, f2, c1, c2)))
    expected = correspondence_loss(f1, f2, c1, c2, shift=shift, stabilize=True).mean()
    torch.testing.assert_close(model(batch)[kind], expected, **CLOSE)


def test_the_local_loss_is_the_same_loss_on_mixed_codes():
    job = train_job(head={"dropout": 0.0}, loss={"local": 0.3, "negatives": 1})
    model, batch = model_of(job), batch_of(job)
    losses, plain = model(batch), model_of(train_job(head={"dropout": 0.0}))
    weights = {kind: getattr(job.loss, kind) for kind in ("self", "knn", "random")}
    codes = [mix_neighbors(model.head(maps), maps) for maps in (batch.anchor, batch.neighbor)]
    partner, (near, far) = (
        batch.draws.partners[0],
        (batch.draws.coords_anchor, batch.draws.coords_other),
    )
    f1, c1 = sample_points(batch.anchor, near), sample_points(codes[0], near)
    others = {
        "self": (f1, c1),
        "knn": (sample_points(batch.neighbor, far), sample_points(codes[1], far)),
        "random": (
            sample_points(batch.anchor[partner], far),
            sample_points(codes[0][partner], far),
        ),
    }
    expected = sum(
        weights[kind].weight * correspondence_loss(f1, f2, c1, c2, shift=weights[kind].shift).mean()
        for kind, (f2, c2) in others.items()
    )
    torch.testing.assert_close(losses["local"], expected, **CLOSE)
    pairs = sum(weights[kind].weight * losses[kind] for kind in weights)
    torch.testing.assert_close(
        losses["total"], losses["cluster"] + pairs + 0.3 * losses["local"], **CLOSE
    )
    assert "local" not in plain(batch)


def test_the_smoothness_energy_finds_planted_clusters_with_its_own_prototypes():
    maps, owner = block_field()
    job = train_job(
        loss={"energy": "smooth", "shifts": "fixed", "samples": 6},
        train={"steps": 300, "head_lr": 1e-2, "probe_lr": 2e-2, "log_every": 300},
        clusters={"refit": "none"},
    )
    data = train_data(len(maps), features=FakeFeatures(maps), neighbors=ring_neighbors(len(maps)))
    context = LocalContext()
    model = train(job, data, context, device="cpu")
    with torch.no_grad():
        scores = model.cluster_probe.scores(model.head(torch.from_numpy(maps).float()))
    found = scores.argmax(1).numpy()
    counts = np.array([[((found == k) & (owner == c)).sum() for k in range(3)] for c in range(3)])
    assert counts.max(1).sum() >= 0.95 * owner.size
    assert len(set(counts.argmax(1))) == 3
    assert "loss/knn" not in context.events[-1]


def test_the_prototypes_of_the_energy_start_anew_with_the_probes():
    model = model_of(train_job(loss={"energy": "smooth"}))
    before = model.teacher.shadow.clusters.clone()
    model.reset_probes(5)
    assert torch.equal(model.teacher.shadow.clusters, model.cluster_probe.clusters)
    assert not torch.equal(model.teacher.shadow.clusters, before)


def test_an_energy_without_any_pair_is_refused():
    argv = ["--loss.energy", "smooth", "--loss.self.weight", "0", "--loss.random.weight", "0"]
    with pytest.raises(ConfigError, match="no other kinds"):
        load_job(TrainJob, argv, prog="x")

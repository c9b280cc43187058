from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import random_maps, ring_neighbors, states_equal, train_job

from stego_core.loss.correspondence import correspondence_loss, correspondence_mean, sample_points
from stego_core.training.sampler import draw_step
from stego_core.training.step import StepBatch, Trainable
from stego_core.training.workers import gather_rows, mean_over_workers

SHIFTS = {"self": 0.3, "knn": 0.2, "random": 0.5}
# The same sums in float32, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def batch_of(job, *, labels=None, layout=torch.channels_last):
    draws = draw_step(job, 3, neighbors_VN=ring_neighbors(9), channels=8)
    maps = torch.from_numpy(random_maps(9)).float()
    anchor, neighbor = maps[draws.anchors], maps[draws.neighbors]
    return StepBatch(
        anchor=anchor.contiguous(memory_format=layout),
        neighbor=neighbor.contiguous(memory_format=layout),
        draws=draws,
        rows=slice(0, job.train.batch),
        labels=labels,
    )


def model_of(job, *, num_classes=0, shifts=SHIFTS):
    return Trainable(job, channels=8, num_classes=num_classes, shifts=shifts)


def labels_of(batch, pixels=5, *, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (batch, pixels), generator=draw)
    return labels, torch.rand(batch, pixels, 2, generator=draw) * 2 - 1


def defined(job, model, batch, shifts):
    """The losses as the paper states them (section 3.2), on whole maps."""
    draws = batch.draws
    keep = draws.keep
    code = model.head(batch.anchor, (keep[0, 0], keep[0, 1]))
    code_knn = model.head(batch.neighbor, (keep[1, 0], keep[1, 1]))
    teacher, teacher_knn = batch.anchor * keep[0, 2], batch.neighbor * keep[1, 2]

    def pair(kind, b, code_b, coords_b):
        return correspondence_loss(
            sample_points(teacher, draws.coords_anchor),
            sample_points(b, coords_b),
            sample_points(code, draws.coords_anchor),
            sample_points(code_b, coords_b),
            shift=shifts[kind],
            pointwise=job.loss.pointwise,
            zero_clamp=job.loss.zero_clamp,
            stabilize=job.loss.stabilize,
        ).mean()

    out = {
        "self": pair("self", teacher, code, draws.coords_anchor),
        "knn": pair("knn", teacher_knn, code_knn, draws.coords_other),
        "random": sum(
            pair("random", teacher[p], code[p], draws.coords_other) for p in draws.partners
        )
        / len(draws.partners),
    }
    cosines = torch.nn.functional.cosine_similarity(
        code.detach()[:, None], model.cluster_probe.clusters[None, :, :, None, None], dim=2
    )
    alpha = job.clusters.alpha
    shares = (cosines == cosines.max(1, keepdim=True).values).float()
    if alpha is not None:
        shares = (alpha * cosines).exp() / (alpha * cosines).exp().sum(1, keepdim=True)
    out["cluster"] = -(shares * cosines).sum(1).mean()
    weights = {kind: getattr(job.loss, kind).weight for kind in shifts}
    out["total"] = out["cluster"] + sum(weights[k] * out[k] for k in shifts)
    return out


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"loss": {"pointwise": False}},
        {"loss": {"zero_clamp": False}},
        {"loss": {"stabilize": True}},
        {"loss": {"negatives": 4}},
        {"clusters": {"alpha": 3.0, "refit": "none"}},
    ],
)
def test_the_losses_are_those_of_the_definition_and_so_are_their_gradients(flags):
    job = train_job(**flags)
    model, again = model_of(job), model_of(job)
    batch = batch_of(job)
    losses, expected = model(batch), defined(job, again, batch, SHIFTS)
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, **CLOSE)
    losses["total"].backward()
    expected["total"].backward()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **CLOSE)


def test_the_memory_layout_of_the_features_does_not_matter():
    job = train_job()
    model = model_of(job)
    losses = [
        model(batch_of(job, layout=layout))["total"]
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    torch.testing.assert_close(*losses, **CLOSE)


def test_without_calibrated_shifts_those_of_the_configuration_are_used():
    job = train_job()
    configured = {kind: getattr(job.loss, kind).shift for kind in ("self", "knn", "random")}
    batch = batch_of(job)
    plain, calibrated = model_of(job, shifts={})(batch), model_of(job, shifts=configured)(batch)
    other = model_of(job)(batch)
    for kind in configured:
        assert torch.equal(plain[kind], calibrated[kind])
        assert not torch.equal(plain[kind], other[kind])


def test_the_probes_send_no_gradient_to_the_head():
    job = train_job()
    model = model_of(job, num_classes=3)
    losses = model(batch_of(job, labels=labels_of(4)))
    (losses["cluster"] + losses["linear"]).backward()
    assert all(parameter.grad is None for parameter in model.head.parameters())
    assert model.cluster_probe.clusters.grad.abs().sum() > 0
    assert model.linear_probe.classifier.weight.grad.abs().sum() > 0


def test_the_correspondence_losses_reach_the_head_only():
    job = train_job()
    model = model_of(job, num_classes=3)
    losses = model(batch_of(job, labels=labels_of(4)))
    (losses["self"] + losses["knn"] + losses["random"]).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.head.parameters())
    assert model.cluster_probe.clusters.grad is None
    assert model.linear_probe.classifier.weight.grad is None


@pytest.mark.parametrize("kind", ["self", "knn", "random"])
def test_a_pair_without_weight_does_not_train_the_head(kind):
    weights = {k: {"weight": 0.0, "shift": 0.0} for k in ("self", "knn", "random")}
    from stego_core.config.method import PairConfig

    weights[kind]["weight"] = 0.5
    job = train_job(loss={k: PairConfig(**v) for k, v in weights.items()})
    model = model_of(job)
    losses = model(batch_of(job))
    torch.testing.assert_close(losses["total"], losses["cluster"] + 0.5 * losses[kind])


def test_the_features_get_no_gradient_from_the_teacher_side():
    # Features are leaves here only to look: what reaches them must have passed through the head.
    job = train_job(head={"dropout": 0.0})
    model = model_of(job)
    for parameter in model.head.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.ones_(model.head.linear.bias)
    batch = batch_of(job)
    batch.anchor.requires_grad_()
    batch.neighbor.requires_grad_()
    model(batch)["total"].backward()
    for maps in (batch.anchor, batch.neighbor):
        assert maps.grad is None or (maps.grad == 0).all()


def test_dropped_channels_of_the_teacher_have_no_influence():
    job = train_job(head={"dropout": 0.5})
    model = model_of(job)
    batch = batch_of(job)
    before = model(batch)
    gone = (batch.draws.keep[0] == 0).all(0)  # dropped in all three uses of an anchor
    assert gone.any()
    batch.anchor.add_(torch.where(gone, 5.0, 0.0))
    after = model(batch)
    for kind in ("self", "knn", "random", "cluster"):
        torch.testing.assert_close(after[kind], before[kind])


def test_what_is_logged_of_a_pair_is_the_mean_code_correspondence():
    job = train_job(loss={"negatives": 1})
    model = model_of(job)
    batch = batch_of(job)
    losses, draws = model(batch), batch.draws
    code = model.head(batch.anchor, (draws.keep[0, 0], draws.keep[0, 1])).detach()
    points = sample_points(code, draws.coords_anchor)
    others = sample_points(code[draws.partners[0]], draws.coords_other)
    torch.testing.assert_close(
        losses["correspondence/self"], correspondence_mean(points, points), **CLOSE
    )
    torch.testing.assert_close(
        losses["correspondence/random"], correspondence_mean(points, others), **CLOSE
    )
    assert not losses["correspondence/self"].requires_grad


def test_the_linear_loss_is_part_of_the_total_and_absent_without_labels():
    job = train_job()
    model = model_of(job, num_classes=3)
    labels = labels_of(4)
    with_labels, without = model(batch_of(job, labels=labels)), model(batch_of(job))
    assert "linear" not in without
    torch.testing.assert_close(with_labels["total"] - with_labels["linear"], without["total"])


def test_ignored_pixels_do_not_count_and_a_batch_of_them_trains_nothing():
    job = train_job()
    model = model_of(job, num_classes=3)
    labels, points = labels_of(4)
    before = model(batch_of(job, labels=(labels, points)))["linear"]
    more = (
        torch.cat([labels, torch.full((4, 2), 255)], 1),
        torch.cat([points, torch.zeros(4, 2, 2)], 1),
    )
    torch.testing.assert_close(model(batch_of(job, labels=more))["linear"], before)
    losses = model(batch_of(job, labels=(torch.full((4, 5), 255), points)))
    assert losses["linear"] == 0
    losses["total"].backward()
    assert (model.linear_probe.classifier.weight.grad == 0).all()


def test_the_seed_alone_decides_the_initial_weights():
    first = model_of(train_job(seed=4), num_classes=3)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert states_equal(first, model_of(train_job(seed=4), num_classes=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.head.linear.weight, model_of(train_job(seed=5)).head.linear.weight)


def test_without_other_workers_gathering_and_averaging_change_nothing():
    rows = torch.from_numpy(np.arange(6.0)).requires_grad_()
    assert gather_rows(rows) is rows
    mean = mean_over_workers(rows)
    assert torch.equal(mean, rows)
    assert not mean.requires_grad
    assert mean.data_ptr() != rows.data_ptr()

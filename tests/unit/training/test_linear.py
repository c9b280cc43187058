from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import FakeFeatures, FakeLabels, train_data, train_job

from stego_core.training import linear
from stego_core.training.fit import fit
from stego_core.training.linear import fit_linear, labelled_points
from stego_core.training.step import Trainable


def drawn(count=400, channels=5, classes=3, *, seed=0):
    """Overlapping classes, so that the optimum is finite, in channels of unlike scale."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    centres = generator.normal(size=(classes, channels))
    scales = 2.0 ** np.arange(channels) / 4
    points = (centres[labels] + generator.normal(size=(count, channels))) * scales + 3
    return torch.from_numpy(points).float(), torch.from_numpy(labels)


def scale_of(points):
    return points.double().std(0, unbiased=False).square().mean().sqrt()


def penalised_loss(weight, bias, points, labels):
    """The objective, written down from its definition, in float64."""
    points, scale = points.double(), scale_of(points)
    logits = points @ weight.T + bias
    log_probs = logits - torch.logsumexp(logits, 1, keepdim=True)
    cross_entropy = -log_probs[torch.arange(len(labels)), labels].mean()
    return cross_entropy + linear._PENALTY * (weight * scale).square().sum()


def test_the_gradient_vanishes_at_the_fitted_weights():
    points, labels = drawn()
    weight, bias = (part.double() for part in fit_linear(points, labels, 3))
    weight.requires_grad_()
    bias.requires_grad_()
    penalised_loss(weight, bias, points, labels).backward()
    assert (weight.grad / scale_of(points)).abs().max() < 3e-3
    assert bias.grad.abs().max() < 1e-3


def test_no_other_weights_have_a_lower_loss():
    points, labels = drawn()
    weight, bias = (part.double() for part in fit_linear(points, labels, 3))
    best = penalised_loss(weight, bias, points, labels)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        noise = 0.05 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        moved = weight + noise / scale_of(points)
        assert penalised_loss(moved, bias, points, labels) > best - 1e-6


def test_a_class_without_a_pixel_is_never_predicted():
    points, labels = drawn(classes=2)
    weight, bias = fit_linear(points, labels * 2, 4)  # classes 0 and 2 of four
    predicted = (points @ weight.T + bias).argmax(1)
    assert set(predicted.tolist()) == {0, 2}
    assert weight.shape == (4, 5)


def test_points_are_read_where_their_labels_are():
    """A map that is linear in x says where a point was read; its label says it, too."""
    ramp = torch.linspace(0, 1, 5).view(1, 1, 1, 5).expand(9, 1, 4, 5).numpy()
    source = FakeFeatures(ramp)
    (values,), labels = labelled_points(
        lambda views: (source.read(views),), FakeLabels(), 9, side=40, seed=0, count=900
    )
    # The ramp is 0.5 in the middle of the view, where labels change.
    assert values[labels == 0].max() <= 0.5 + 1e-6
    assert values[labels == 1].min() >= 0.5 - 1e-6
    assert 300 < len(labels) < 900  # a third of the views has no labels
    assert {view for read in source.reads for view in read} == set(range(9))


def test_without_a_labelled_pixel_there_are_no_points():
    class Nothing(FakeLabels):
        def read(self, views, pixels, side):
            labels, coords = super().read(views, pixels, side)
            return torch.full_like(labels, 255), coords

    source = FakeFeatures(np.zeros((3, 2, 4, 4)))
    kinds, labels = labelled_points(
        lambda views: (source.read(views),), Nothing(), 3, side=8, seed=0, count=90
    )
    assert (kinds, len(labels)) == ([], 0)


@pytest.mark.parametrize("refit", [True, False])
def test_a_model_file_has_the_probe_on_features_only_where_probes_are_fitted(refit):
    job = train_job(train={"linear_refit": refit})
    data = train_data(labels=True)
    model = Trainable(job, channels=8, num_classes=2, shifts={}).eval()
    tensors = fit(job, model, data)
    assert tensors["linear.weight"].shape == (2, 6)
    assert ("baseline_linear.weight" in tensors) == refit
    if refit:
        assert tensors["baseline_linear.weight"].shape == (2, 8)


@pytest.mark.parametrize("refit", [False, True])
def test_labels_change_nothing_but_the_linear_probes(refit):
    job = train_job(train={"linear_refit": refit})
    with_labels = fit(
        job, Trainable(job, channels=8, num_classes=2, shifts={}).eval(), train_data(labels=True)
    )
    without = fit(job, Trainable(job, channels=8, num_classes=0, shifts={}).eval(), train_data())
    assert without.keys() == {k for k in with_labels if "linear." not in k or k.startswith("head.")}
    assert all(torch.equal(with_labels[name], without[name]) for name in without)

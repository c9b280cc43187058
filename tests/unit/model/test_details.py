"""Details: what a model keeps of the features beside the code, for linear probes alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import FakeFeatures, FakeLabels, ring_neighbors, train_data, train_job

from stego_core.errors import CheckpointError, ShapeError
from stego_core.inference.scoring import head_on_features
from stego_core.model.whitening import Whitening, fit_whitening
from stego_core.training.fit import fit
from stego_core.training.step import Trainable


def anisotropic(count=400, channels=9):
    """Tokens whose channels vary less and less, around one direction that they share."""
    noise = torch.randn(count, channels, generator=torch.Generator().manual_seed(0))
    tokens = noise * 0.5 ** torch.arange(channels)
    tokens[:, 0] += 8
    return tokens


def test_details_are_the_further_components_at_half_their_share():
    tokens = anisotropic()
    whitening = fit_whitening(tokens, 3, details=4)
    unit = F.normalize(tokens, dim=1).double()
    variances, components = torch.linalg.eigh(torch.cov(unit.T, correction=0))
    variances, components = variances.flip(0), components.flip(1)
    expected = (unit - unit.mean(0)) @ components[:, 3:7] / variances[2].sqrt() / 2
    found = whitening.details(tokens[:, :, None, None])[:, :, 0, 0].double()
    # The sign of a component is free.
    torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-4, rtol=1e-3)


def test_the_whitened_features_are_the_same_with_and_without_details():
    maps = anisotropic()[:, :, None, None]
    plain = fit_whitening(anisotropic(), 3)
    assert torch.equal(fit_whitening(anisotropic(), 3, details=4)(maps), plain(maps))
    assert plain.details(maps).shape == (400, 0, 1, 1)


def test_there_are_no_more_details_than_components():
    assert fit_whitening(anisotropic(), 3, details=50).num_details == 6
    assert fit_whitening(anisotropic(), 9, details=50).num_details == 0
    assert fit_whitening(anisotropic(4), 5, details=50).num_details == 0


def test_a_map_of_the_whitened_features_leaves_details_alone():
    whitening = fit_whitening(anisotropic(), 3, details=2)
    assert torch.equal(whitening.followed_by(2 * torch.eye(3)).detail, whitening.detail)


DIRECTIONS = np.linalg.qr(np.random.default_rng(3).normal(size=(8, 8)))[0]


def fitted(details):
    """A model of two whitened components whose labels show in a direction of little variance."""
    generator = np.random.default_rng(0)
    owner = generator.integers(0, 3, (12, 5, 4))
    maps = 3 * DIRECTIONS[owner] + 0.1 * generator.normal(size=(12, 5, 4, 8))
    is_right = np.arange(4) >= 2  # as `FakeLabels` has it
    maps += 0.2 * np.where(is_right, 1.0, -1.0)[:, None] * DIRECTIONS[5]
    features = FakeFeatures(maps.transpose(0, 3, 1, 2))
    job = train_job(
        head={"dim": 2, "whiten": 2, "details": details, "smooth": 0.0},
        train={"linear_refit": True},
    )
    tokens = torch.from_numpy(maps.reshape(-1, 8)).float()
    whitening = fit_whitening(tokens, 2, details=details)
    model = Trainable(job, channels=2, num_classes=2, shifts={}, whitening=whitening).eval()
    data = train_data(
        12,
        labels=True,
        features=features,
        neighbors=ring_neighbors(12),
        channels=2,
        whitening=whitening,
    )
    tensors = fit(job, model, data)
    return tensors, head_on_features(tensors, {"head": dataclasses.asdict(job.head)}, 8), data


def accuracy(model, data):
    """Share of drawn labelled pixels that the linear probe classifies as they are labelled."""
    pixels = torch.from_numpy(np.random.default_rng(1).random((12, 50, 2)))
    labels, coords = FakeLabels().read(np.arange(12), pixels, 40)
    features, code = model.encode(data.features.read(np.arange(12)))
    logits = model.products(model.seen_by("linear", features, code), "linear")
    at = F.grid_sample(logits, coords[:, None].float(), align_corners=False)[:, :, 0].argmax(1)
    known = labels < 255
    return (at == labels)[known].float().mean()


def test_a_linear_probe_finds_in_details_what_the_code_has_lost():
    _, without, data = fitted(0)
    _, with_details, _ = fitted(6)
    assert accuracy(without, data) < 0.8
    assert accuracy(with_details, data) > 0.95


def test_details_change_nothing_but_the_linear_probe():
    without, _, _ = fitted(0)
    with_details, _, _ = fitted(6)
    assert with_details["linear.weight"].shape == (2, 2 + 6)
    assert without["linear.weight"].shape == (2, 2)
    own = {"linear.weight", "linear.bias", "whitening.detail"}
    assert with_details.keys() - without.keys() == {"whitening.detail"}
    assert all(torch.equal(with_details[k], without[k]) for k in without.keys() - own)


@pytest.mark.parametrize("width", [7, 9])
def test_a_linear_probe_of_another_width_is_refused(width):
    tensors, model, _ = fitted(6)
    changed = {**tensors, "linear.weight": torch.zeros(2, width)}
    with pytest.raises(CheckpointError, match="linear"):
        head_on_features(changed, model.card, 8)


def test_a_probe_on_the_code_alone_is_read_without_details():
    tensors, model, data = fitted(6)
    model = head_on_features({**tensors, "linear.weight": torch.zeros(2, 2)}, model.card, 8)
    features, code = model.encode(data.features.read(np.arange(2)))
    assert model.seen_by("linear", features, code) is code
    assert model.seen_by("cluster", features, code) is code
    assert model.seen_by("baseline_linear", features, code) is features


def test_details_of_another_width_are_refused():
    with pytest.raises(ShapeError, match="give"):
        Whitening(torch.zeros(3), torch.zeros(2, 3), torch.zeros(2, 4))

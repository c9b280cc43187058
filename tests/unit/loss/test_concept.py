from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from reference import options_reference as reference

from stego_core.loss.concept import contrast_codes


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def likeness(*shape, seed):
    """Mostly between -1 and 1, some NaN."""
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return values.where(values > -0.95, torch.nan)


def test_the_contrast_is_that_of_the_loops():
    codes, keys, near = drawn(2, 4, 3, seed=0), drawn(9, 3, seed=1), likeness(2, 4, 9, seed=2)
    found = contrast_codes(codes, keys, near)
    for image in range(2):
        expected = reference.contrast(codes[image].numpy(), keys.numpy(), near[image].numpy())
        assert found[image].item() == pytest.approx(expected, rel=1e-10)


def test_the_gradient_is_that_of_the_definition_and_reaches_the_codes_alone():
    codes, keys = drawn(2, 3, 3, seed=0).requires_grad_(), drawn(6, 3, seed=1).requires_grad_()
    near = likeness(2, 3, 6, seed=2)
    assert torch.autograd.gradcheck(lambda c: contrast_codes(c, keys, near), [codes])
    contrast_codes(codes, keys, near).sum().backward()
    assert keys.grad is None


def test_codes_without_positives_cost_nothing_and_spoil_no_gradient():
    codes, keys = drawn(2, 2, 3, seed=0).requires_grad_(), drawn(4, 3, seed=1)
    near = torch.full((2, 2, 4), 0.2, dtype=torch.float64)  # neither positive nor negative
    near[0, 0] = torch.tensor([0.9, -1, -1, 0.9])
    costs = contrast_codes(codes, keys, near)
    costs.sum().backward()
    assert costs[1] == 0
    assert costs[0] > 0
    assert torch.isfinite(codes.grad).all()
    assert not codes.grad[0, 1].any()


def test_a_code_moves_to_its_positives_and_from_its_negatives():
    codes = torch.tensor([[[1.0, 1.0]]], requires_grad=True)
    keys = torch.eye(2)
    contrast_codes(codes, keys, torch.tensor([[[0.9, 0.0]]])).sum().backward()
    moved = (codes - codes.grad).detach()[0, 0]
    assert math.atan2(moved[1], moved[0]) < math.pi / 4
    assert np.isfinite(moved.numpy()).all()

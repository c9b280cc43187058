from __future__ import annotations

import numpy as np
import pytest
import torch

from stego_core.errors import ShapeError
from stego_core.model.consistency import consistent_projection


def drawn(rows, scales, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, len(scales))) * scales)


def test_directions_are_scaled_by_how_well_matched_tokens_agree_in_them():
    # Independent axes: the answer is known for each of them.
    deviations, noise = np.array([1.0, 2.0, 0.5, 1.0]), np.array([0.1, 0.2, 1.0, 1.0])
    found = consistent_projection(drawn(200_000, deviations, 0), drawn(200_000, noise, 1))
    disagreement = (noise / deviations) ** 2
    expected = (disagreement / disagreement.mean() + 0.1) ** -0.5 / deviations
    assert torch.diagonal(found).numpy() == pytest.approx(expected, rel=0.02)
    off = found - torch.diag(torch.diagonal(found))
    assert off.abs().max() < 0.05


def test_without_matches_variances_are_made_equal():
    tokens = (
        drawn(5000, np.array([3.0, 1.0, 0.2]), 0) @ torch.linalg.qr(torch.randn(3, 3).double())[0]
    )
    found = consistent_projection(tokens, tokens[:0])
    mapped = (tokens - tokens.mean(0)) @ found.double().T
    torch.testing.assert_close(
        torch.cov(mapped.T, correction=0), torch.eye(3).double(), atol=1e-5, rtol=0
    )


def test_a_constant_direction_and_perfect_agreement_stay_finite():
    tokens = drawn(100, np.array([1.0, 1.0, 0.0]), 0)
    found = consistent_projection(tokens, torch.zeros(20, 3))
    assert torch.isfinite(found).all()


def test_tokens_and_differences_need_the_same_channels():
    with pytest.raises(ShapeError, match=r"\(T, D\) and \(P, D\)"):
        consistent_projection(torch.zeros(4, 3), torch.zeros(4, 2))

from __future__ import annotations

import pytest
import torch
from reference import options_reference as reference

from stego_core.config.method import HeadConfig, LossConfig, settled_loss
from stego_core.loss.correspondence import correspondence_mean
from stego_core.loss.shifts import adaptive_shift


def maps(channels, *, seed):
    generator = torch.Generator().manual_seed(seed)
    # A common direction, so that the means are not about 0.
    return torch.randn(2, channels, 2, 3, generator=generator, dtype=torch.float64) + 0.7


@pytest.mark.parametrize("kind", ["self", "knn", "random"])
def test_the_shift_is_the_formula_by_hand(kind):
    f1, f2, c1, c2 = maps(5, seed=0), maps(5, seed=1), maps(3, seed=2), maps(3, seed=3)
    expected = reference.adaptive_shift(kind, *(m.numpy() for m in (f1, f2, c1, c2)))
    shift = adaptive_shift(kind, correspondence_mean(f1, f2), correspondence_mean(c1, c2))
    assert shift.item() == pytest.approx(expected, abs=1e-12)


def test_numbers_that_can_be_checked_in_the_head():
    features, code = torch.tensor(0.3), torch.tensor(0.5)
    assert adaptive_shift("self", features, code).item() == pytest.approx(0.2)
    assert adaptive_shift("knn", code, features).item() == pytest.approx(0.2)
    assert adaptive_shift("random", features, code).item() == pytest.approx(2.8)


def test_the_shift_sends_no_gradient_to_the_code():
    code = torch.tensor(0.5, requires_grad=True)
    assert not adaptive_shift("random", torch.tensor(0.3), code).requires_grad


def test_automatic_shifts_follow_the_batch_where_nothing_is_whitened():
    found = {
        (mode, whiten): settled_loss(LossConfig(shifts=mode), HeadConfig(whiten=whiten)).shifts
        for mode in ("auto", "fixed", "adaptive")
        for whiten in (0, 64)
    }
    assert found.pop(("auto", 0)) == "adaptive"
    assert all(mode == settled for (mode, _), settled in found.items())

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from reference import stego_reference as reference
from torch import Tensor

from stego_core.errors import ShapeError
from stego_core.loss.correspondence import (
    centre,
    correspondence,
    correspondence_loss,
    correspondence_mean,
    derangement,
    overlapping_permutation,
    sample_points,
)

# The golden values are printed with ten decimals.
GOLDEN_TOLERANCE = 1e-9
FLAGS = list(itertools.product([True, False], repeat=3))


def wave(shape: tuple[int, ...], k: float, phase: float) -> Tensor:
    return torch.from_numpy(reference.wave(shape, k, phase))


def golden_input() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        wave((2, 3, 2, 2), 0.7, 0.0),
        wave((2, 3, 2, 2), 1.3, 0.5),
        wave((2, 2, 2, 2), 0.9, 0.2),
        wave((2, 2, 2, 2), 1.7, 1.0),
    )


def random_input(seed: int, batch: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(batch, 5, 3, 3, generator=draw, dtype=torch.float64) for _ in "ab")
    c, d = (torch.randn(batch, 4, 3, 3, generator=draw, dtype=torch.float64) for _ in "cd")
    return a, b, c, d


def test_sampling_gives_the_golden_values_with_swapped_axes():
    maps = torch.arange(16, dtype=torch.float64).reshape(1, 1, 4, 4)
    coords = torch.tensor([[[[-1, -1], [0.5, -0.25]], [[1, 1], [-0.3, 0.9]]]], dtype=torch.float64)
    expected = torch.tensor([[[[0, 15], [6.75, 12.45]]]], dtype=torch.float64)
    torch.testing.assert_close(sample_points(maps, coords), expected, atol=1e-9, rtol=0)


def test_sampling_equals_the_loops_inside_and_beyond_the_border():
    draw = torch.Generator().manual_seed(1)
    maps = torch.randn(2, 3, 5, 7, generator=draw, dtype=torch.float64)
    coords = 2.6 * torch.rand(2, 4, 4, 2, generator=draw, dtype=torch.float64) - 1.3
    expected = reference.sample_points(maps.numpy(), coords.numpy())
    np.testing.assert_allclose(sample_points(maps, coords).numpy(), expected, atol=1e-12)


def test_sampling_half_precision_maps_is_done_in_single_precision():
    maps = torch.rand(1, 2, 4, 4).half()
    coords = torch.rand(1, 3, 3, 2)
    torch.testing.assert_close(sample_points(maps, coords), sample_points(maps.float(), coords))


@pytest.mark.parametrize(
    ("maps", "coords"),
    [((2, 3, 4), (2, 5, 5, 2)), ((2, 3, 4, 4), (2, 5, 5, 3)), ((2, 3, 4, 4), (1, 5, 5, 2))],
)
def test_sampling_refuses_points_that_do_not_belong_to_the_maps(maps, coords):
    with pytest.raises(ShapeError):
        sample_points(torch.zeros(maps), torch.zeros(coords))


def test_correspondence_equals_the_loops_for_grids_of_different_size():
    draw = torch.Generator().manual_seed(2)
    a = torch.randn(2, 3, 2, 4, generator=draw, dtype=torch.float64)
    b = torch.randn(2, 3, 3, 1, generator=draw, dtype=torch.float64)
    expected = reference.correspondence(a.numpy(), b.numpy())
    assert expected.shape == (2, 2, 4, 3, 1)
    np.testing.assert_allclose(correspondence(a, b).numpy(), expected, atol=1e-12)
    assert correspondence_mean(a, b).item() == pytest.approx(expected.mean(), abs=1e-12)


def test_a_zero_vector_has_cosine_zero_and_a_finite_gradient():
    a = torch.zeros(1, 3, 2, 2, requires_grad=True)
    cosines = correspondence(a, torch.ones(1, 3, 2, 2))
    cosines.sum().backward()
    assert (cosines == 0).all()
    assert torch.isfinite(a.grad).all()


def test_correspondence_of_half_precision_is_computed_in_single_precision():
    a = torch.randn(1, 8, 2, 2, generator=torch.Generator().manual_seed(0)).half()
    cosines = correspondence(a, a)
    assert cosines.dtype == torch.float32
    torch.testing.assert_close(cosines, correspondence(a.float(), a.float()))


def test_correspondence_refuses_maps_of_different_width():
    with pytest.raises(ShapeError, match="same B and C"):
        correspondence(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 2, 2))


def test_centring_equals_the_three_steps_of_the_original():
    a, b, _, _ = random_input(3)
    cosines = correspondence(a, b)
    np.testing.assert_allclose(
        centre(cosines).numpy(), reference.centre(cosines.numpy()), atol=1e-12
    )


def test_centring_gives_every_point_the_batch_mean():
    a, b, _, _ = random_input(4)
    cosines = correspondence(a, b)
    rows = centre(cosines).mean(dim=(3, 4))
    torch.testing.assert_close(rows, cosines.mean().expand_as(rows), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("pointwise", "zero_clamp", "stabilize", "expected"),
    [
        (True, True, False, 0.0226962516),
        (True, True, True, 0.0183278590),
        (True, False, False, -0.0239947536),
        (True, False, True, -0.0283631462),
        (False, True, False, 0.0222117738),
        (False, True, True, 0.0180750710),
        (False, False, False, -0.0229073627),
        (False, False, True, -0.0270440654),
    ],
)
def test_the_loss_has_the_golden_mean(pointwise, zero_clamp, stabilize, expected):
    loss = correspondence_loss(
        *golden_input(),
        shift=0.12,
        pointwise=pointwise,
        zero_clamp=zero_clamp,
        stabilize=stabilize,
    )
    assert loss.mean().item() == pytest.approx(expected, abs=GOLDEN_TOLERANCE)


def test_the_code_correspondence_has_the_golden_mean():
    _, _, code_a, code_b = golden_input()
    mean = correspondence(code_a, code_b).mean().item()
    assert mean == pytest.approx(-0.0008547887, abs=GOLDEN_TOLERANCE)


@pytest.mark.parametrize(("pointwise", "zero_clamp", "stabilize"), FLAGS)
def test_every_element_of_the_loss_equals_the_loops(pointwise, zero_clamp, stabilize):
    inputs = random_input(5, batch=2)
    flags = {"pointwise": pointwise, "zero_clamp": zero_clamp, "stabilize": stabilize}
    expected = reference.correspondence_loss(*(t.numpy() for t in inputs), shift=0.3, **flags)
    loss = correspondence_loss(*inputs, shift=torch.tensor(0.3, dtype=torch.float64), **flags)
    np.testing.assert_allclose(loss.numpy(), expected, atol=1e-12)


def test_the_gradient_flows_to_both_codes_and_not_to_features():
    inputs = [t.requires_grad_() for t in random_input(6)]
    correspondence_loss(*inputs, shift=0.1).mean().backward()
    features_a, features_b, code_a, code_b = inputs
    assert features_a.grad is None
    assert features_b.grad is None
    assert code_a.grad.abs().sum() > 0
    assert code_b.grad.abs().sum() > 0


def test_the_gradient_equals_finite_differences():
    features_a, features_b, code_a, code_b = random_input(7, batch=1)
    assert torch.autograd.gradcheck(
        lambda a, b: correspondence_loss(features_a, features_b, a, b, shift=0.1).mean(),
        (code_a.requires_grad_(), code_b.requires_grad_()),
    )


def test_stabilising_stops_the_gradient_of_pairs_that_already_agree():
    code = torch.ones(1, 4, 2, 2, dtype=torch.float64)
    code += 0.01 * wave((1, 4, 2, 2), 0.9, 0.2)
    features = wave((1, 3, 2, 2), 0.7, 0.0)
    free, held = code.clone().requires_grad_(), code.clone().requires_grad_()
    correspondence_loss(features, features, free, free, shift=0.1).sum().backward()
    correspondence_loss(features, features, held, held, shift=0.1, stabilize=True).sum().backward()
    assert free.grad.abs().sum() > 0
    assert held.grad.abs().sum() == 0


def test_two_workers_with_the_global_mean_get_the_loss_of_one():
    inputs = random_input(8, batch=4)
    whole = correspondence_loss(*inputs, shift=0.1)
    means = [
        correspondence_mean(a, b) for a, b in zip(*(t.chunk(2) for t in inputs[:2]), strict=True)
    ]
    global_mean = torch.stack(means).mean()
    halves = [
        correspondence_loss(*(t[half] for t in inputs), shift=0.1, global_mean=global_mean)
        for half in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.cat(halves), whole, atol=1e-12, rtol=0)
    alone = correspondence_loss(*(t[:2] for t in inputs), shift=0.1)
    assert not torch.allclose(alone, whole[:2], atol=1e-6)


def test_the_loss_refuses_a_code_sampled_at_other_points():
    with pytest.raises(ShapeError, match="same points"):
        correspondence_loss(*(torch.zeros(1, 3, s, s) for s in (2, 2, 3, 2)), shift=0.0)


def test_derangements_have_no_fixed_point_and_are_permutations():
    generator = torch.Generator().manual_seed(0)
    for count in [2, 3, 4, 5, 16, 33] * 20:
        partners = derangement(count, generator)
        assert sorted(partners.tolist()) == list(range(count))
        assert (partners != torch.arange(count)).all()


def test_all_derangements_of_four_are_equally_likely():
    generator = torch.Generator().manual_seed(0)
    draws = 4500
    seen = Counter(tuple(derangement(4, generator).tolist()) for _ in range(draws))
    assert len(seen) == 9
    chi_square = sum((times - draws / 9) ** 2 / (draws / 9) for times in seen.values())
    # The 99.9 % quantile of chi-square with 8 degrees of freedom.
    assert chi_square < 26.12


def test_a_batch_of_one_is_paired_with_itself():
    generator = torch.Generator().manual_seed(0)
    assert derangement(1, generator).tolist() == [0]
    assert overlapping_permutation(1, generator).tolist() == [0]


def test_the_same_seed_draws_the_same_partners():
    first, second = (derangement(16, torch.Generator().manual_seed(9)) for _ in range(2))
    assert first.equal(second)


@pytest.mark.parametrize("draw", [derangement, overlapping_permutation])
def test_an_empty_batch_has_no_partners(draw):
    with pytest.raises(ShapeError, match="at least 1"):
        draw(0, torch.Generator())


def test_the_original_partners_are_never_oneself_but_repeat_as_often_as_measured():
    generator = torch.Generator().manual_seed(0)
    repeats = 0
    for _ in range(1000):
        partners = overlapping_permutation(4, generator)
        assert (partners != torch.arange(4)).all()
        repeats += len(set(partners.tolist())) < 4
    # 58 % in the original; three standard deviations of 1000 draws are 5 points.
    assert 0.53 < repeats / 1000 < 0.63

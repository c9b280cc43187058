from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import optional_reference as reference

from stego_core.errors import ShapeError
from stego_core.images.augment import Augmentation, source_coords
from stego_core.images.geometry import Box
from stego_core.loss.alignment import alignment_loss, transpose_coords
from stego_core.loss.crf import SIDE, crf_loss
from stego_core.loss.reconstruction import reconstruction_loss

# Sums of the same float64 numbers in another order.
TOLERANCE = 1e-9


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def coords_of(*augmentations, side=16, grid=(4, 4)):
    return torch.from_numpy(np.stack([source_coords(a, side, *grid) for a in augmentations]))


def near_pixels(count=25):
    """Pixels close to each other, so that every term of the kernel counts, each drawn twice."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(20, 25, size=(count, 2))
    return torch.from_numpy(np.concatenate([pixels, pixels]))


IDENTITY = Augmentation(flip=False, box=Box(0, 0, 16, 16))
FLIP = Augmentation(flip=True, box=Box(0, 0, 16, 16))


def test_the_reconstruction_loss_equals_the_loops():
    decoded, features = drawn(2, 5, 3, 4), drawn(2, 5, 3, 4, seed=1)
    features[0, :, 0, 0] = 0
    expected = reference.reconstruction_loss(decoded.numpy(), features.numpy())
    assert reconstruction_loss(decoded, features).item() == pytest.approx(expected, abs=TOLERANCE)


def test_perfect_and_opposite_reconstructions_have_the_extreme_losses():
    features = drawn(2, 5, 3, 4)
    assert reconstruction_loss(3 * features, features).item() == pytest.approx(-1)
    assert reconstruction_loss(-features, features).item() == pytest.approx(1)


def test_the_features_that_are_reconstructed_get_no_gradient():
    decoded, features = drawn(1, 3, 2, 2).requires_grad_(), drawn(1, 3, 2, 2, seed=1)
    features.requires_grad_()
    reconstruction_loss(decoded, features).backward()
    assert decoded.grad.abs().sum() > 0
    assert features.grad is None


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_the_alignment_loss_equals_the_loops(grid):
    changes = [
        Augmentation(flip=True, box=Box(1, 2, 13, 11)),
        Augmentation(flip=False, box=Box(0, 3, 16, 13)),
    ]
    coords = coords_of(*changes, grid=grid)
    augmented, code = drawn(2, 5, *grid), drawn(2, 5, 6, 7, seed=1)
    expected = reference.alignment_loss(augmented.numpy(), code.numpy(), coords.numpy())
    found = alignment_loss(augmented, code, coords)
    assert found.item() == pytest.approx(expected, abs=TOLERANCE)


def test_a_flipped_code_aligns_with_the_flip_and_with_nothing_else():
    code = drawn(1, 5, 4, 4)
    aligned = alignment_loss(code.flip(3), code, coords_of(FLIP))
    assert aligned.item() == pytest.approx(-1, abs=TOLERANCE)
    assert alignment_loss(code.flip(2), code, coords_of(FLIP)).item() > -0.9
    assert alignment_loss(code, code, coords_of(FLIP)).item() > -0.9
    assert alignment_loss(code, code, coords_of(IDENTITY)).item() == pytest.approx(-1)


def test_a_crop_of_the_upper_half_aligns_with_the_upper_half():
    code = drawn(1, 5, 4, 4)
    upper = coords_of(Augmentation(flip=False, box=Box(0, 0, 8, 16)), grid=(2, 4))
    assert alignment_loss(code[:, :, :2], code, upper).item() == pytest.approx(-1, abs=TOLERANCE)
    assert alignment_loss(code[:, :, 2:], code, upper).item() > -0.9


def test_transposed_as_in_the_original_a_horizontal_flip_is_undone_as_a_vertical_one():
    code = drawn(1, 5, 4, 4)
    vertical = alignment_loss(code.flip(2), code, coords_of(FLIP), transposed=True)
    assert vertical.item() == pytest.approx(-1, abs=TOLERANCE)
    horizontal = alignment_loss(code.flip(3), code, coords_of(FLIP), transposed=True)
    assert horizontal.item() > -0.9


def test_transposed_as_in_the_original_the_upper_half_is_taken_for_the_left_one():
    upper = coords_of(Augmentation(flip=False, box=Box(0, 0, 8, 16)))
    left = coords_of(Augmentation(flip=False, box=Box(0, 0, 16, 8)))
    torch.testing.assert_close(transpose_coords(upper), left)
    torch.testing.assert_close(transpose_coords(coords_of(IDENTITY)), coords_of(IDENTITY))
    with pytest.raises(ShapeError, match="isn't square"):
        transpose_coords(torch.zeros(1, 2, 3, 2))


def test_the_alignment_loss_reaches_both_codes():
    augmented, code = drawn(1, 3, 4, 4).requires_grad_(), drawn(1, 3, 4, 4, seed=1)
    code.requires_grad_()
    alignment_loss(augmented, code, coords_of(FLIP)).backward()
    assert augmented.grad.abs().sum() > 0
    assert code.grad.abs().sum() > 0


def test_the_crf_loss_equals_the_loops():
    images, code = 0.3 * drawn(2, 3, 9, 8), drawn(2, 4, 5, 6, seed=1)
    pixels = near_pixels()
    expected = reference.crf_loss(images.numpy(), code.numpy(), pixels.numpy())
    assert crf_loss(images, code, pixels).item() == pytest.approx(expected, abs=TOLERANCE)


def test_the_crf_loss_follows_the_colour_of_the_image():
    # Two regions of code; the image has the same two regions, or the other way round.
    code = torch.zeros(1, 2, SIDE, SIDE, dtype=torch.float64)
    code[:, 0, :, :22], code[:, 1, :, 22:] = 1, 1
    like = code[:, :1].repeat(1, 3, 1, 1)
    unlike = torch.zeros_like(like)
    pixels = near_pixels()
    # An even image wants even codes, so the edge of the code costs more there.
    agree = crf_loss(like, code, pixels) - crf_loss(like, torch.ones_like(code), pixels)
    disagree = crf_loss(unlike, code, pixels) - crf_loss(unlike, torch.ones_like(code), pixels)
    assert 0 < agree < 0.1 * disagree


def test_the_crf_loss_reaches_the_code_only():
    images, code = drawn(1, 3, 8, 8).requires_grad_(), drawn(1, 4, 5, 5).requires_grad_()
    crf_loss(images, code, near_pixels()).backward()
    assert images.grad is None
    assert code.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: reconstruction_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4)),
        lambda: alignment_loss(
            torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 4, 2)
        ),
        lambda: crf_loss(torch.zeros(2, 3, 8, 8), torch.zeros(1, 2, 3, 3), near_pixels()),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(ShapeError):
        call()

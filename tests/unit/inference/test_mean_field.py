from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stego_core.errors import ShapeError
from stego_core.inference import lattice as lattice_module
from stego_core.inference.crf import refine
from stego_core.inference.lattice import Lattice
from stego_core.inference.mean_field import refine_mean_field


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_noise(channels, height, width, *, seed=0, cells=6):
    options = {"mode": "bicubic", "align_corners": False}
    return F.interpolate(noise(1, channels, cells, cells, seed=seed), (height, width), **options)[0]


def scene(height=60, width=75, count=9):
    """An image of smooth colours and grain, and scores that follow its colours roughly."""
    colours = smooth_noise(3, height, width, seed=1)
    pixels = (128 + 50 * colours + 2 * noise(3, height, width, seed=2)).clamp(0, 255)
    scores = smooth_noise(count, height, width, seed=3) + torch.einsum(
        "nc,chw->nhw", noise(count, 3, seed=4), colours
    )
    pixels_HW3 = pixels.permute(1, 2, 0).to(torch.uint8).contiguous()
    return pixels_HW3, torch.log_softmax(scores + 0.3 * noise(count, height, width, seed=5), 0)


def refined(pixels_HW3, log_probs_NHW, **options):
    """The labels of one image."""
    return refine_mean_field(pixels_HW3[None], log_probs_NHW[None], **options)[0]


def test_filtering_is_close_to_a_gaussian_of_unit_variance():
    points = 3 * torch.rand(2, 400, generator=torch.Generator().manual_seed(0))
    values = torch.rand(400, 3, generator=torch.Generator().manual_seed(1))
    found = Lattice(points).filter(values)
    exact = torch.exp(-0.5 * torch.cdist(points.T, points.T).square()) @ values
    scale = (exact * found).sum() / found.square().sum()
    # The lattice's kernel is piecewise linear: within some percent of the Gaussian.
    assert ((scale * found - exact).abs() / exact).mean() < 0.05


def test_filtering_is_symmetric_and_linear():
    lattice = Lattice(2 * noise(4, 50))
    kernel = lattice.filter(torch.eye(50))
    # Directions are blurred one after the other: symmetric up to vertices that no point touches.
    assert (kernel - kernel.T).abs().max() < 0.25 * kernel.max()
    values = noise(50, 2, seed=1)
    torch.testing.assert_close(lattice.filter(values), kernel @ values, atol=1e-5, rtol=1e-4)


def test_a_single_point_has_a_kernel_and_no_point_has_none():
    assert Lattice(torch.zeros(5, 1)).filter(torch.ones(1, 1)).item() > 0
    with pytest.raises(ShapeError):
        Lattice(torch.zeros(5, 0))
    with pytest.raises(ShapeError, match="2 equal sets"):
        Lattice(torch.zeros(5, 3), sets=2)
    with pytest.raises(ShapeError, match="too wide"):
        Lattice(torch.tensor([[0.0, 1e6]] * 5))


def test_sets_of_points_do_not_see_each_other():
    # The same places and far ones: what a set's points are given never reaches another's.
    points = torch.cat([2 * noise(3, 200), 2 * noise(3, 200), 9 * noise(3, 200, seed=1)], 1)
    values = noise(600, 2, seed=2)
    found = Lattice(points, sets=3).filter(values).split(200)
    for of_set, of_values, expected in zip(
        points.split(200, 1), values.split(200), found, strict=True
    ):
        torch.testing.assert_close(Lattice(of_set).filter(of_values), expected)


def test_keys_too_long_to_be_packed_are_sorted_all_the_same(monkeypatch):
    points, values = 2 * noise(3, 200), noise(200, 2, seed=1)
    expected = Lattice(points).filter(values)
    monkeypatch.setattr(lattice_module, "_MAX_BITS", 21)
    assert torch.equal(Lattice(points).filter(values), expected)


def test_with_all_clusters_told_apart_labels_are_those_of_pydensecrf():
    pytest.importorskip("pydensecrf.densecrf")
    pixels, log_probs = scene()
    expected = refine(pixels.numpy(), log_probs, "dense")
    found = refined(pixels, log_probs, tolerance=torch.inf, is_exact=True).numpy()
    assert (expected != log_probs.argmax(0).numpy()).mean() > 0.05  # there is something to refine
    # The Gaussian kernel is exact here and on a lattice there.
    assert (found == expected).mean() > 0.99


def test_the_fast_path_is_close_to_the_one_without_shortcuts():
    pixels, log_probs = scene()
    full = refined(pixels, log_probs, tolerance=torch.inf, is_exact=True)
    fast = refined(pixels, log_probs)
    assert (full != log_probs.argmax(0)).double().mean() > 0.05
    assert (fast == full).double().mean() > 0.99


def batch():
    """Three images: nine clusters matter, three do beside six that don't, and one does."""
    pixels, many = scene()
    few = torch.log_softmax(torch.cat([many[:3], many.amin(0).expand(6, -1, -1) - 1]), 0)
    one = torch.log_softmax(9 * torch.eye(9)[4].view(9, 1, 1).expand_as(many), 0)
    return torch.stack([pixels, pixels.flip(1), pixels.flip(0)]), torch.stack([many, few, one])


@pytest.mark.parametrize("is_exact", [False, True])
def test_images_of_a_batch_have_the_labels_that_each_has_alone(is_exact):
    images, scores = batch()
    found = refine_mean_field(images, scores, is_exact=is_exact)
    alone = torch.stack(
        [refined(*pair, is_exact=is_exact) for pair in zip(images, scores, strict=True)]
    )
    assert [len(labels.unique()) for labels in found] == [9, 3, 1]
    # Sums of another length may be rounded differently.
    assert (found == alone).double().mean() > 0.9999


def test_clusters_that_are_best_nowhere_do_not_appear_and_still_weigh():
    pixels, log_probs = scene(count=4)
    # 20 more clusters with most of the mass between them, each below the best everywhere.
    many = torch.cat([log_probs, log_probs.amin(0).expand(20, -1, -1)])
    many = torch.log_softmax(many, 0)
    found = refined(pixels, many)
    assert found.max() < 4
    full = refined(pixels, many, tolerance=torch.inf, is_exact=True)
    assert (found == full).double().mean() > 0.98


def test_an_image_of_one_cluster_stays_of_one_cluster():
    log_probs = torch.log_softmax(torch.eye(3)[1].view(3, 1, 1).expand(3, 5, 7), 0)
    pixels = torch.zeros(5, 7, 3, dtype=torch.uint8)
    assert torch.equal(refined(pixels, log_probs), torch.ones(5, 7, dtype=torch.long))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (3, 2)])
def test_the_smallest_images_are_refined(height, width):
    log_probs = torch.log_softmax(noise(3, height, width), 0)
    pixels = np.zeros((height, width, 3), np.uint8)
    assert refine(pixels, log_probs, "fast").shape == (height, width)


def test_the_same_image_gives_the_same_labels_and_another_size_is_refused():
    pixels, log_probs = scene(20, 30)
    first, second = (refined(pixels, log_probs) for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(ShapeError):
        refined(pixels[:-1], log_probs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_accelerator_gives_the_labels_of_the_cpu():
    images, scores = batch()
    found = refine_mean_field(images.cuda(), scores.cuda()).cpu()
    assert (found == refine_mean_field(images, scores)).double().mean() > 0.995

"""The numbers of the CRF are those of the paper's evaluation, in both implementations.

Numbers stand here as literals: a constant that is changed must meet a test that disagrees.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stego_core.inference import mean_field
from stego_core.inference.crf import refine

HEIGHT, WIDTH, CLUSTERS = 4, 60, 3  # as wide as the bilateral kernel


def scene() -> tuple[Tensor, Tensor]:
    """Pixels of near colours, and scores for which ten iterations are too few to settle."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(100, 104, (HEIGHT, WIDTH, 3), generator=generator, dtype=torch.uint8)
    scores = torch.randn(CLUSTERS, HEIGHT, WIDTH, generator=generator)
    return pixels, torch.log_softmax(scores, 0)


def test_pydensecrf_is_given_the_papers_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}

    class DenseCRF2D:
        def __init__(self, *size: int) -> None:
            calls["size"] = size

        def setUnaryEnergy(self, unary: np.ndarray) -> None:
            calls["unary"] = unary

        def addPairwiseGaussian(self, **options: Any) -> None:
            calls["gaussian"] = options

        def addPairwiseBilateral(self, *, rgbim: np.ndarray, **options: Any) -> None:
            calls["bilateral"], calls["pixels"] = options, rgbim

        def inference(self, iterations: int) -> np.ndarray:
            calls["iterations"] = iterations
            return -calls["unary"]

    package, library = ModuleType("pydensecrf"), ModuleType("pydensecrf.densecrf")
    library.DenseCRF2D = DenseCRF2D  # type: ignore[attr-defined]
    package.densecrf = library  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pydensecrf", package)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", library)
    pixels, log_probs = scene()
    found = refine(pixels.numpy(), log_probs, "dense")
    np.testing.assert_array_equal(found, log_probs.argmax(0).numpy())
    assert calls["size"] == (WIDTH, HEIGHT, CLUSTERS)
    assert calls["gaussian"] == {"sxy": 1, "compat": 3}
    assert calls["bilateral"] == {"sxy": 67, "srgb": 3, "compat": 4}
    assert calls["iterations"] == 10
    np.testing.assert_array_equal(calls["pixels"], pixels.numpy())
    np.testing.assert_array_equal(calls["unary"], -log_probs.reshape(CLUSTERS, -1).numpy())


class ExactFilter:
    """What the lattice approximates: every pixel with every other."""

    def __init__(self, features_dP: Tensor, *, sets: int) -> None:
        assert sets == 1
        apart_dPP = features_dP[:, :, None] - features_dP[:, None]
        self._kernel = torch.exp(-0.5 * apart_dPP.square().sum(0))

    def filter(self, values_PC: Tensor, *, out: Tensor | None = None) -> Tensor:
        found = self._kernel @ values_PC
        return found if out is None else out.copy_(found)


def slow_mean_field(pixels: Tensor, log_probs: Tensor, iterations: int) -> Tensor:
    """Return q (C, P) by the paper's algorithm 1 with all pairs of pixels, in float64."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    places = torch.stack([columns.flatten(), rows.flatten()], 1).double()
    colours = pixels.reshape(-1, 3).double()
    apart = torch.cdist(places, places).square()
    gaussian = torch.exp(-0.5 * apart / 1**2)
    # Ours ends three standard deviations away, in either direction.
    near = (places[:, None] - places[None]).abs().amax(2) <= 3
    gaussian = gaussian * near
    bilateral = torch.exp(-0.5 * (apart / 67**2 + torch.cdist(colours, colours).square() / 3**2))
    weights = torch.zeros(len(places), len(places), dtype=torch.float64)
    for compat, kernel in ((3, gaussian), (4, bilateral)):
        scale = kernel.sum(1).rsqrt()
        weights += compat * scale[:, None] * kernel * scale
    scores = log_probs.reshape(CLUSTERS, -1).double()
    q = torch.softmax(scores, 0)
    for _ in range(iterations):
        q = torch.softmax(scores + q @ weights, 0)
    return q


def test_our_own_inference_has_the_papers_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    last: list[Tensor] = []
    best = mean_field._best
    monkeypatch.setattr(mean_field, "Lattice", ExactFilter)
    monkeypatch.setattr(mean_field, "_best", lambda q: (last.append(q.clone()), best(q))[1])
    pixels, log_probs = scene()
    mean_field.refine_mean_field(pixels[None], log_probs[None], tolerance=torch.inf, is_exact=True)
    (found,) = last
    torch.testing.assert_close(
        found.double(), slow_mean_field(pixels, log_probs, 10), atol=1e-5, rtol=0
    )
    # Another iteration would be seen.
    for other in (9, 11):
        apart = (found - slow_mean_field(pixels, log_probs, other)).abs().max()
        assert apart > 1e-3

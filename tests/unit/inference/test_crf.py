from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stego_core.errors import ConfigError
from stego_core.inference import crf
from stego_core.inference.crf import refine, require_crf, upsampled_log_probs


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width"), [(12, 20), (3, 4), (31, 7)])
def test_log_probs_are_those_of_the_upsampled_code(height, width):
    code, centroids = drawn(5, 3, 4), F.normalize(drawn(7, 5, seed=1), dim=1)
    products = torch.einsum("khw,nk->nhw", code, centroids)
    found = upsampled_log_probs(products, code, height=height, width=width, alpha=2.0)
    options = {"mode": "bilinear", "align_corners": False}
    wide = F.interpolate(code[None].double(), (height, width), **options)[0]
    cosines = torch.einsum("khw,nk->nhw", F.normalize(wide, dim=0), centroids.double())
    assert found.dtype == torch.float32
    expected = torch.log_softmax(2 * cosines, 0)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_logits_are_not_divided_by_the_length_of_the_code():
    logits, code = drawn(7, 3, 4), drawn(5, 3, 4, seed=1)
    found = upsampled_log_probs(logits, code, height=9, width=8, alpha=2.0, is_cosine=False)
    wide = F.interpolate(logits[None], (9, 8), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found, torch.log_softmax(wide, 0), atol=1e-5, rtol=0)


def test_without_pairwise_weights_the_argmax_stays(monkeypatch):
    pytest.importorskip("pydensecrf.densecrf")
    monkeypatch.setattr(crf, "GAUSSIAN_COMPAT", 0)
    monkeypatch.setattr(crf, "BILATERAL_COMPAT", 0)
    log_probs = torch.log_softmax(3 * drawn(6, 14, 19), 0)
    pixels = np.random.default_rng(0).integers(0, 256, (14, 19, 3), dtype=np.uint8)
    found = refine(pixels, log_probs, "dense")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, log_probs.argmax(0).numpy())


@pytest.mark.parametrize("method", ["dense", "fast"])
def test_an_isolated_wrong_pixel_of_an_even_image_is_removed(method):
    if method == "dense":
        pytest.importorskip("pydensecrf.densecrf")
    scores = torch.zeros(3, 15, 15)
    scores[1] = 1
    scores[1, 7, 7], scores[2, 7, 7] = 0, 1
    log_probs = torch.log_softmax(2 * scores, 0)
    assert log_probs[:, 7, 7].argmax() == 2
    found = refine(np.full((15, 15, 3), 90, np.uint8), log_probs, method)
    assert (found == 1).all()


@pytest.mark.parametrize("method", ["dense", "fast"])
def test_an_edge_of_the_image_keeps_two_clusters_apart(method):
    if method == "dense":
        pytest.importorskip("pydensecrf.densecrf")
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    scores = torch.zeros(2, 16, 16)
    scores[0, :, :8] = scores[1, :, 8:] = 1
    scores[:, :, 7] = torch.tensor([0.0, 1.0])[:, None]  # one column on the wrong side
    found = refine(pixels, torch.log_softmax(2 * scores, 0), method)
    assert (found[:, :8] == 0).all()
    assert (found[:, 8:] == 1).all()


def test_the_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(ConfigError, match=r"pip install 'stego-ray\[crf\]'"):
        require_crf("dense")
    require_crf("fast")  # which needs none


def test_an_image_that_can_not_be_written_to_is_refined_all_the_same() -> None:
    pixels = np.frombuffer(bytes(8 * 8 * 3), np.uint8).reshape(8, 8, 3)
    log_probs = torch.log_softmax(torch.arange(2 * 64.0).reshape(2, 8, 8) / 64, 0)
    assert not pixels.flags.writeable
    assert refine(pixels, log_probs, "fast").shape == (8, 8)
    pytest.importorskip("pydensecrf.densecrf")
    assert refine(pixels, log_probs, "dense").shape == (8, 8)

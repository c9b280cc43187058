from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import stego_reference as reference

from stego_core.config.schema import BackboneConfig
from stego_core.inference import upsample
from stego_core.inference.predict import (
    grid_confidence,
    interpolation_matrix,
    segment,
    upsampled_argmax,
)
from stego_core.model.backbone import load_backbone
from stego_core.model.segmenter import Segmenter

SIZES = [(5, 7, 40, 56), (4, 4, 13, 29), (1, 6, 9, 31), (3, 2, 3, 2), (6, 5, 4, 3), (1, 1, 5, 5)]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def resized(maps, height, width):
    """Torch's own upsampling, in float64."""
    options = {"mode": "bilinear", "align_corners": False}
    return F.interpolate(maps[None].double(), (height, width), **options)[0]


def decided(scores, gap=1e-4):
    """Pixels whose best score is ahead by more than rounding."""
    if len(scores) == 1:
        return torch.ones(scores.shape[1:], dtype=torch.bool).numpy()
    best = scores.topk(2, 0).values
    clear = (best[0] - best[1] > gap).numpy()
    assert clear.mean() > 0.9
    return clear


@pytest.mark.parametrize(("size", "grid"), [(7, 3), (320, 23), (5, 5), (3, 8), (1, 4), (9, 1)])
def test_the_matrix_is_torchs_bilinear_interpolation(size, grid):
    unit = torch.eye(grid, dtype=torch.float64)[None]
    expected = F.interpolate(unit, size, mode="linear", align_corners=False)[0].T
    found = interpolation_matrix(size, grid)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(size))


@pytest.mark.parametrize(("h", "w", "height", "width"), SIZES)
def test_the_label_map_is_the_argmax_of_the_upsampled_scores(h, w, height, width):
    scores = drawn(9, h, w, seed=h * w)
    wide = resized(scores, height, width)
    found = upsampled_argmax(scores, height, width)
    assert found.shape == (height, width)
    assert found.dtype == np.uint8
    clear = decided(wide)
    np.testing.assert_array_equal(found[clear], wide.argmax(0).numpy()[clear])


@pytest.mark.parametrize("strip_bytes", [1, 4 * 9 * 57 * 3, 4 * 9 * 57 * 40])
def test_strips_change_nothing(strip_bytes, monkeypatch):
    scores = drawn(9, 5, 7)
    whole = upsampled_argmax(scores, 41, 57)
    monkeypatch.setattr(upsample, "_STRIP_BYTES", strip_bytes)
    np.testing.assert_array_equal(upsampled_argmax(scores, 41, 57), whole)


def test_leaving_out_clusters_that_are_nowhere_largest_changes_nothing(monkeypatch):
    scores = drawn(40, 6, 9, seed=3)
    scores[7] = scores[3]  # equals: the first counts
    scores[11] = scores[3] - 1e-7
    some = upsampled_argmax(scores, 50, 71)
    everyone = np.ones(scores.shape, bool)
    monkeypatch.setattr(upsample, "_contenders", lambda _: everyone)
    np.testing.assert_array_equal(upsampled_argmax(scores, 50, 71), some)


def test_a_cluster_that_is_largest_only_between_tokens_is_found():
    scores = torch.tensor([[[10.0, 0.0]], [[0.0, 10.0]], [[9.0, 9.0]]])
    assert upsampled_argmax(scores, 2, 10).tolist() == [[0, 0, 0, 2, 2, 2, 2, 1, 1, 1]] * 2


@pytest.mark.parametrize(("count", "dtype"), [(255, np.uint8), (256, np.uint16)])
def test_labels_take_two_bytes_beyond_255_clusters(count, dtype):
    scores = torch.zeros(count, 2, 2)
    scores[count - 1] = 1
    found = upsampled_argmax(scores, 4, 4)
    assert found.dtype == dtype
    assert (found == count - 1).all()


@pytest.fixture(scope="module")
def segmenter():
    backbone = load_backbone(BackboneConfig(name="test_vit", weights="random", precision="fp32"))
    tensors = {
        "head.linear.weight": drawn(6, backbone.width, 1, 1),
        "head.linear.bias": drawn(6, seed=1),
        "clusters": 3 * drawn(9, 6, seed=2),
        "baseline": drawn(4, backbone.width, seed=3),
        "linear.weight": drawn(5, 6, seed=4),
        "linear.bias": drawn(5, seed=5),
    }
    return Segmenter(backbone, tensors, {"head": {"kind": "linear", "dim": 6}})


@pytest.mark.parametrize(("h", "w", "height", "width"), SIZES)
@pytest.mark.parametrize("kind", ["cluster", "baseline_kmeans"])
def test_upsampled_products_have_the_argmax_of_the_cosines_of_the_upsampled_code(
    segmenter, h, w, height, width, kind
):
    name = "clusters" if kind == "cluster" else "baseline"
    centroids = segmenter.get_buffer(name).double()
    maps = drawn(1, centroids.shape[1], h, w, seed=7)
    wide = F.normalize(resized(maps[0], height, width), dim=0)
    cosines = torch.einsum("khw,nk->nhw", wide, F.normalize(centroids, dim=1))
    found = upsampled_argmax(segmenter.products(maps, kind)[0], height, width)
    clear = decided(cosines)
    np.testing.assert_array_equal(found[clear], cosines.argmax(0).numpy()[clear])


def test_upsampled_logits_have_the_argmax_of_the_linear_probe_on_the_upsampled_code(segmenter):
    code = drawn(1, 6, 4, 5, seed=8)
    weight, bias = (tensor.double() for tensor in segmenter.classifiers["linear"])
    logits = torch.einsum("khw,nk->nhw", resized(code[0], 30, 41), weight) + bias[:, None, None]
    found = upsampled_argmax(segmenter.products(code, "linear")[0], 30, 41)
    clear = decided(logits)
    np.testing.assert_array_equal(found[clear], logits.argmax(0).numpy()[clear])


def test_confidence_and_entropy_equal_the_loops():
    code, centroids = drawn(4, 3, 5), F.normalize(drawn(6, 4, seed=1), dim=1)
    confidence, entropy = grid_confidence(
        torch.einsum("khw,nk->nhw", code, centroids), code, alpha=2.0
    )
    cosines = reference.cluster_scores(code[None].double().numpy(), centroids.double().numpy())[0]
    entropies = []
    for y, x in np.ndindex(3, 5):
        log_probs = reference.log_softmax(2.0 * cosines[:, y, x])
        assert confidence[y, x] == pytest.approx(math.exp(max(log_probs)), abs=1e-5)
        entropies.append(-sum(math.exp(value) * value for value in log_probs))
    assert entropy == pytest.approx(sum(entropies) / 15, abs=1e-5)
    assert confidence.dtype == np.float32


def test_a_code_of_length_zero_is_as_unsure_as_can_be():
    confidence, entropy = grid_confidence(torch.zeros(4, 2, 2), torch.zeros(3, 2, 2), alpha=2.0)
    np.testing.assert_allclose(confidence, 0.25, atol=1e-6)
    assert entropy == pytest.approx(math.log(4), abs=1e-6)


def test_a_perfect_match_among_27_clusters_has_the_probability_that_is_promised():
    products = torch.zeros(27, 1, 1)
    products[5] = 1
    code = torch.zeros(3, 1, 1)
    code[0] = 1
    assert grid_confidence(products, code, alpha=2.0)[0] == pytest.approx(
        math.exp(2) / (math.exp(2) + 26), abs=1e-6
    )


def test_a_segmentation_has_labels_at_full_size_and_confidence_on_the_grid(segmenter):
    _, code = segmenter.encode(torch.zeros(1, 32, 48, 3, dtype=torch.uint8))
    products = segmenter.products(code, "cluster")[0]
    found = segment(products, code[0], height=64, width=100, alpha=2.0)
    assert found.labels.shape == (64, 100)
    assert found.confidence.shape == tuple(code.shape[2:])
    assert 0 <= found.entropy <= math.log(9) + 1e-6


def test_merged_clusters_are_the_clusters_that_everything_downstream_sees():
    backbone = load_backbone(BackboneConfig(name="test_vit", weights="random", precision="fp32"))
    tensors = {
        "head.linear.weight": drawn(6, backbone.width, 1, 1),
        "head.linear.bias": drawn(6, seed=1),
        "clusters": drawn(9, 6, seed=2),
    }
    card = {"head": {"kind": "linear", "dim": 6}}
    merge = torch.tensor([0, 1, 2, 1, 0, 3, 3, 2, 1])
    fine = Segmenter(backbone, tensors, card)
    coarse = Segmenter(backbone, {**tensors, "merge": merge}, card)
    assert (fine.num_clusters, coarse.num_clusters) == (9, 4)
    code = drawn(1, 6, 5, 7, seed=8)
    products = coarse.products(code, "cluster")
    assert products.shape == (1, 4, 5, 7)
    # At the tokens themselves: the group of the best of all nine.
    assert torch.equal(products.argmax(1), merge[fine.products(code, "cluster").argmax(1)])
    found = segment(products[0], code[0], height=40, width=56, alpha=2.0)
    assert set(np.unique(found.labels)) <= set(range(4))
    assert found.entropy <= math.log(4) + 1e-6

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import stego_reference as reference
from torch import Tensor

from stego_core.errors import ShapeError
from stego_core.model.probes import ClusterProbe, LinearProbe


def golden_probe() -> ClusterProbe:
    probe = ClusterProbe(2, 3).double()
    with torch.no_grad():
        probe.clusters.copy_(torch.tensor([[1, 0], [0, 2], [-1, -1]]))
    return probe


def golden_code() -> Tensor:
    return torch.from_numpy(reference.wave((1, 2, 2, 2), 0.9, 0.2))


def random_code(*, seed: int = 0, batch: int = 2, dim: int = 4, h: int = 3, w: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, dim, h, w, generator=draw, dtype=torch.float64)


def pixel_centres(height: int, width: int, batch: int) -> Tensor:
    y = (2 * torch.arange(height, dtype=torch.float64) + 1) / height - 1
    x = (2 * torch.arange(width, dtype=torch.float64) + 1) / width - 1
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], dim=-1).reshape(1, -1, 2).repeat(batch, 1, 1)


def test_the_cluster_probe_has_the_golden_hard_loss_and_clusters():
    probe, code = golden_probe(), golden_code()
    assert probe.loss(code).item() == pytest.approx(-0.6711469288, abs=1e-9)
    assert probe.scores(code).argmax(dim=1).tolist() == [[[2, 0], [0, 0]]]


def test_the_cluster_probe_has_the_golden_soft_loss():
    assert golden_probe().loss(golden_code(), 2.0).item() == pytest.approx(-0.5338935421, abs=1e-9)


def test_the_cluster_probe_has_the_golden_log_probabilities():
    pixel = golden_probe().log_probs(golden_code(), 2.0)[0, :, 0, 0].tolist()
    # Printed in single precision: the third is off by one unit of its last place, 6e-8. The test
    # against the loops is the exact one.
    assert pixel == pytest.approx([-0.8828624, -3.4027525, -0.5921783], abs=1e-7)


@pytest.mark.parametrize("alpha", [None, 0.7, 3.0])
def test_scores_and_losses_equal_the_loops(alpha):
    torch.manual_seed(0)
    probe, code = ClusterProbe(4, 6).double(), random_code()
    clusters = probe.clusters.detach().numpy()
    scores = reference.cluster_scores(code.numpy(), clusters)
    np.testing.assert_allclose(probe.scores(code).detach().numpy(), scores, atol=1e-12)
    expected = reference.cluster_loss(code.numpy(), clusters, alpha)
    assert probe.loss(code, alpha).item() == pytest.approx(expected, abs=1e-12)


def test_log_probabilities_equal_the_loops_and_sum_to_one():
    torch.manual_seed(0)
    probe, code = ClusterProbe(4, 6).double(), random_code()
    log_probs = probe.log_probs(code, 2.0).detach()
    scores = reference.cluster_scores(code.numpy(), probe.clusters.detach().numpy())
    expected = np.apply_along_axis(lambda cell: reference.log_softmax(2 * cell), 1, scores)
    np.testing.assert_allclose(log_probs.numpy(), expected, atol=1e-12)
    torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(2, 3, 5).double())


def test_clusters_start_as_standard_normal_numbers():
    torch.manual_seed(0)
    clusters = ClusterProbe(500, 40).clusters
    assert clusters.shape == (40, 500)
    # Five standard deviations of 20 000 draws.
    assert clusters.mean().item() == pytest.approx(0, abs=0.036)
    assert clusters.std().item() == pytest.approx(1, abs=0.026)


def test_a_zero_code_has_cosine_zero_with_every_cluster():
    assert (golden_probe().scores(torch.zeros(1, 2, 1, 1).double()) == 0).all()


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_the_cluster_loss_trains_the_clusters_and_not_the_code(alpha):
    probe, code = golden_probe(), golden_code().requires_grad_()
    probe.loss(code, alpha).backward()
    assert code.grad is None
    assert probe.clusters.grad.abs().sum() > 0


@pytest.mark.parametrize("probe", [ClusterProbe(3, 5), LinearProbe(3, 5)])
def test_a_code_of_another_width_is_refused(probe):
    with pytest.raises(ShapeError, match=r"\(B, 3, h, w\)"):
        (probe.scores if isinstance(probe, ClusterProbe) else probe)(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("size", [(12, 20), (7, 11), (2, 3), (1, 1)])
def test_logits_sampled_at_pixel_centres_equal_resized_logits(size):
    torch.manual_seed(0)
    probe, code = LinearProbe(4, 3).double(), random_code()
    resized = F.interpolate(probe(code), size=size, mode="bilinear", align_corners=False)
    labels = torch.randint(0, 3, (2, *size))
    expected = F.cross_entropy(resized, labels)
    loss = probe.loss(code, labels.flatten(1), pixel_centres(*size, batch=2))
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)


def test_the_linear_loss_leaves_out_pixels_whose_label_is_no_class():
    torch.manual_seed(0)
    probe, code = LinearProbe(4, 3).double(), random_code(h=1, w=1)
    labels = torch.tensor([[0, 255, 2, -1], [3, 1, 255, 1]])
    coords = torch.zeros(2, 4, 2, dtype=torch.float64)
    logits = probe(code).detach().numpy()[:, :, 0, 0].repeat(4, axis=0)
    expected = reference.cross_entropy(logits, labels.flatten().numpy())
    assert probe.loss(code, labels, coords).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("pixels", [3, 0])
def test_a_batch_without_a_labelled_pixel_costs_exactly_zero_and_keeps_the_graph(pixels):
    probe, code = LinearProbe(4, 3).double(), random_code()
    labels = torch.full((2, pixels), 255)
    loss = probe.loss(code, labels, torch.zeros(2, pixels, 2))
    loss.backward()
    assert loss.item() == 0
    assert all((parameter.grad == 0).all() for parameter in probe.parameters())


def test_the_linear_loss_trains_the_probe_and_not_the_code():
    probe, code = LinearProbe(4, 3).double(), random_code().requires_grad_()
    probe.loss(code, torch.ones(2, 1, dtype=torch.int64), torch.zeros(2, 1, 2)).backward()
    assert code.grad is None
    assert probe.classifier.weight.grad.abs().sum() > 0


def test_two_workers_that_share_the_number_of_pixels_get_the_loss_of_one():
    torch.manual_seed(0)
    probe, code = LinearProbe(4, 3).double(), random_code(batch=4)
    labels = torch.tensor([[0, 1, 2], [255, 255, 1], [255, 0, 255], [255, 255, 255]])
    coords = 2 * torch.rand(4, 3, 2, dtype=torch.float64) - 1
    whole = probe.loss(code, labels, coords)
    halves = [
        probe.loss(code[half], labels[half], coords[half], num_valid=5 / 2)
        for half in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(halves) / 2, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("labels", "coords"), [((2, 3), (2, 4, 2)), ((1, 3), (1, 3, 2)), ((2, 3), (2, 3, 3))]
)
def test_labels_and_pixels_that_disagree_are_refused(labels, coords):
    with pytest.raises(ShapeError, match="labels"):
        LinearProbe(4, 3).double().loss(
            random_code(), torch.zeros(labels, dtype=torch.int64), torch.zeros(coords)
        )

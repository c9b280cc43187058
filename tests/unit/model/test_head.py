from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import stego_reference as reference

from stego_core.config.method import HeadConfig
from stego_core.errors import ConfigError, ShapeError
from stego_core.model.head import Head, dropout_masks

NONLINEAR = HeadConfig(kind="nonlinear", dim=4)
LINEAR = HeadConfig(kind="linear", dim=4)


def make_head(config: HeadConfig, width: int = 6) -> Head:
    torch.manual_seed(0)
    return Head(width, config).double()


def make_features(width: int = 6) -> torch.Tensor:
    return torch.randn(
        2, width, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def weights_of(head: Head) -> dict[str, np.ndarray]:
    layers = {"1": head.linear}
    if head.nonlinear is not None:
        layers |= {"2": head.nonlinear[0], "3": head.nonlinear[2]}
    return {
        key + name: array.detach().numpy().squeeze()
        for name, layer in layers.items()
        for key, array in (("w", layer.weight), ("b", layer.bias))
    }


@pytest.mark.parametrize(
    ("width", "dim", "kind", "expected"),
    [
        (384, 70, "nonlinear", 201_740),
        (768, 90, "nonlinear", 729_012),
        (384, 70, "linear", 384 * 70 + 70),
    ],
)
def test_the_head_has_the_golden_number_of_parameters(width, dim, kind, expected):
    head = Head(width, HeadConfig(kind=kind, dim=dim))
    assert sum(parameter.numel() for parameter in head.parameters()) == expected


@pytest.mark.parametrize("config", [NONLINEAR, LINEAR])
def test_the_code_equals_the_matrix_products_at_every_cell(config):
    head, features = make_head(config), make_features()
    expected = reference.head(features.numpy(), weights_of(head))
    code = head(features)
    assert code.shape == (2, 4, 3, 5)
    np.testing.assert_allclose(code.detach().numpy(), expected, atol=1e-12)


def test_each_branch_is_dropped_by_its_own_mask():
    head, features = make_head(NONLINEAR), make_features()
    generator = torch.Generator().manual_seed(2)
    first, second = (dropout_masks(2, 6, 0.5, generator).double() for _ in range(2))
    assert not first.equal(second)
    weights = weights_of(head)
    nothing = {"w1": 0 * weights["w1"], "b1": 0 * weights["b1"]}
    linear = reference.head((features * first).numpy(), {"w1": weights["w1"], "b1": weights["b1"]})
    nonlinear = reference.head((features * second).numpy(), weights | nothing)
    code = head(features, (first, second)).detach().numpy()
    np.testing.assert_allclose(code, linear + nonlinear, atol=1e-12)


def test_training_and_evaluation_mode_give_the_same_code_without_masks():
    head, features = make_head(NONLINEAR), make_features()
    assert head.train()(features).equal(head.eval()(features))


def test_dropout_masks_hold_the_scaled_keep_value_and_drop_the_asked_share():
    masks = dropout_masks(100, 384, 0.1, torch.Generator().manual_seed(0))
    assert masks.shape == (100, 384, 1, 1)
    assert masks.unique().tolist() == pytest.approx([0, 1 / 0.9])
    # Five standard deviations of 38 400 draws are 0.8 points.
    assert (masks == 0).float().mean().item() == pytest.approx(0.1, abs=0.008)


def test_dropout_zero_keeps_everything():
    assert (dropout_masks(3, 5, 0.0, torch.Generator()) == 1).all()


def test_dropout_masks_of_one_seed_are_equal():
    first, second = (dropout_masks(4, 8, 0.5, torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.equal(second)


@pytest.mark.parametrize("p", [1.0, -0.1])
def test_an_impossible_dropout_is_a_configuration_error(p):
    with pytest.raises(ConfigError, match=r"head\.dropout"):
        dropout_masks(1, 1, p, torch.Generator())


def test_features_of_another_width_are_refused():
    with pytest.raises(ShapeError, match=r"\(B, 6, h, w\)"):
        make_head(NONLINEAR)(make_features(width=5))


def test_a_mask_of_another_batch_is_refused():
    masks = (torch.ones(1, 6, 1, 1), torch.ones(1, 6, 1, 1))
    with pytest.raises(ShapeError, match="dropout mask"):
        make_head(NONLINEAR)(make_features(), masks)


def test_without_a_head_the_code_is_the_features_whatever_dim_and_masks_say():
    head, features = make_head(HeadConfig(kind="none", dim=4)), make_features()
    masks = tuple(dropout_masks(2, 6, 0.5, torch.Generator().manual_seed(2)).double() for _ in "ab")
    assert head.dim == 6
    assert torch.equal(head(features), features)
    assert torch.equal(head(features, masks), features)
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_without_a_head_a_projection_can_still_be_folded_in():
    head, features = make_head(HeadConfig(kind="none")), make_features()
    mean, projection = torch.arange(6).double(), torch.eye(6).double() * 2
    head.project_code(mean, projection)
    torch.testing.assert_close(head(features), 2 * (features - mean.view(1, 6, 1, 1)))

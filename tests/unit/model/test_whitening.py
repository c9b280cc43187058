from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stego_core.config.method import HeadConfig
from stego_core.errors import ShapeError
from stego_core.model.head import Head
from stego_core.model.smoothing import smooth_code
from stego_core.model.whitening import Whitening, fit_whitening, principal_scaling


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def anisotropic(count=4000, channels=12):
    """Tokens around a mean, whose directions differ a hundredfold in variance."""
    scale = torch.logspace(0, -2, channels)
    mixing = torch.linalg.qr(drawn(channels, channels, seed=1))[0]
    return (drawn(count, channels) * scale) @ mixing + 2 * drawn(channels, seed=2)


def test_scaled_components_have_unit_covariance_and_no_mean():
    tokens = anisotropic()
    mean, projection = principal_scaling(tokens, 12)
    white = (tokens - mean) @ projection.T
    torch.testing.assert_close(white.mean(0), torch.zeros(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.cov(white.T, correction=0), torch.eye(12), atol=1e-3, rtol=0)


def test_fewer_components_are_the_widest_in_the_same_order():
    tokens = anisotropic()
    whole, few = principal_scaling(tokens, 12)[1], principal_scaling(tokens, 5)[1]
    assert torch.equal(whole[:5], few)
    # A component divided by its deviation: the widest is scaled up the least.
    lengths = whole.norm(dim=1)
    assert (lengths[1:] > lengths[:-1]).all()


def test_the_result_follows_from_the_tokens_and_not_from_their_order():
    tokens = anisotropic(500)
    first = principal_scaling(tokens, 6)
    again = principal_scaling(tokens.flip(0), 6)
    for one, two in zip(first, again, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_there_are_no_more_components_than_tokens_or_channels():
    assert principal_scaling(drawn(3, 8), 64)[1].shape == (3, 8)
    assert principal_scaling(drawn(100, 8), 64)[1].shape == (8, 8)


def test_tokens_that_are_all_the_same_do_no_harm():
    whitening = fit_whitening(torch.ones(10, 4), 4)
    assert torch.isfinite(whitening(torch.ones(1, 4, 2, 2))).all()


def test_maps_are_whitened_cell_by_cell_as_written_down():
    tokens = anisotropic(300)
    whitening = fit_whitening(tokens, 6)
    maps = tokens[:12].T.reshape(1, 12, 3, 4)
    unit = F.normalize(tokens, dim=1).double()
    centred = unit - unit.mean(0)
    variances, components = torch.linalg.eigh(centred.T @ centred / 300)
    widest = components.flip(1)[:, :6] / variances.flip(0)[:6].sqrt()
    expected = F.normalize(centred[:12] @ widest, dim=1)
    found = whitening(maps)[0].flatten(1).T.double()
    # The sign of a component is free; cosines don't depend on it.
    torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=1e-4, rtol=0)


def test_whitening_tells_apart_what_a_wide_direction_hides():
    wide = drawn(2000)
    side = torch.where(drawn(2000, seed=4) > 0, 0.3, -0.3)
    tokens = torch.stack([torch.full_like(wide, 10.0), wide, side], 1)
    raw = F.normalize(tokens, dim=1)
    white = fit_whitening(tokens, 2)(tokens[:, :, None, None])[:, :, 0, 0]
    same = side[:, None] == side[None]
    assert (raw @ raw.T)[same].mean() - (raw @ raw.T)[~same].mean() < 0.01
    assert (white @ white.T)[same].mean() - (white @ white.T)[~same].mean() > 0.5


def test_wrong_shapes_are_refused():
    with pytest.raises(ShapeError, match="give"):
        Whitening(torch.zeros(3), torch.zeros(2, 4))


@pytest.mark.parametrize("kind", ["linear", "nonlinear", "transformer"])
@pytest.mark.parametrize("dim", [3, 5, 8])
def test_a_head_can_start_as_the_identity(kind, dim):
    head = Head(5, HeadConfig(kind=kind, dim=dim))
    head.start_as_identity()
    maps = drawn(2, 5, 3, 3)
    code = head(maps)
    shared = min(dim, 5)
    assert torch.equal(code[:, :shared], maps[:, :shared])
    assert not code[:, shared:].any()
    code.square().sum().backward()
    assert head.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["linear", "nonlinear", "transformer"])
def test_a_projection_of_the_code_is_folded_into_the_head(kind):
    head = Head(5, HeadConfig(kind=kind, dim=4))
    maps, mean, projection = drawn(2, 5, 3, 3), drawn(4, seed=1), drawn(4, 4, seed=2)
    with torch.no_grad():
        code = head(maps)
        expected = torch.einsum("ij,bjhw->bihw", projection, code - mean.view(1, -1, 1, 1))
        head.project_code(mean, projection)
        torch.testing.assert_close(head(maps), expected, atol=1e-5, rtol=1e-5)


def test_smoothed_codes_are_the_written_down_average():
    code, features = drawn(2, 4, 3, 5), drawn(2, 7, 3, 5, seed=1)
    found = smooth_code(code, features, temperature=0.1)
    for image in range(2):
        unit = F.normalize(features[image].flatten(1), dim=0).double()
        weights = torch.softmax(unit.T @ unit / 0.1, dim=1)
        expected = (weights @ code[image].flatten(1).T.double()).T.reshape(4, 3, 5)
        torch.testing.assert_close(found[image].double(), expected, atol=1e-5, rtol=1e-4)


def test_smoothing_evens_codes_inside_a_region_and_keeps_its_border():
    features = torch.zeros(1, 2, 4, 6)
    features[:, 0, :, :3] = 1
    features[:, 1, :, 3:] = 1
    code = features + 0.5 * drawn(1, 2, 4, 6)
    smooth = smooth_code(code, features, temperature=0.1)
    for region in (smooth[..., :3], smooth[..., 3:]):
        assert region.flatten(2).std(2).max() < 1e-3
    assert (smooth[0, 0, :, :3] > 0.5).all()
    assert (smooth[0, 0, :, 3:] < 0.5).all()


def test_without_a_temperature_nothing_is_smoothed():
    code = drawn(1, 2, 3, 3)
    assert smooth_code(code, code, temperature=0) is code

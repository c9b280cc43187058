from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import options_reference as reference

from stego_core.config.method import HeadConfig
from stego_core.model.decoder import DecoderBlock
from stego_core.model.head import Head

CONFIG = HeadConfig(kind="transformer", dim=4)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block_of(width=6, seed=0):
    torch.manual_seed(seed)
    block = DecoderBlock(width).double()
    # Biases and scales that start as constants would hide mistakes.
    for parameter in block.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return block


def test_the_block_is_the_layer_written_down():
    block, features = block_of(), drawn(2, 6, 3, 4, seed=1)
    weights = {name: value.numpy() for name, value in block.layer.state_dict().items()}
    found = block(features).detach().flatten(2).transpose(1, 2).numpy()
    for image, tokens in zip(found, features.flatten(2).transpose(1, 2).numpy(), strict=True):
        expected = tokens + reference.decoder_layer(tokens, weights)
        np.testing.assert_allclose(image, expected, atol=1e-10)


def test_a_code_depends_on_the_other_tokens_of_its_image_and_on_no_other_image():
    torch.manual_seed(0)
    head, features = Head(6, CONFIG).double(), drawn(2, 6, 3, 4)
    other = features.clone()
    other[1, :, 0, 0] += 1
    before, after = head(features), head(other)
    assert torch.equal(before[0], after[0])
    assert not torch.isclose(before[1, :, 2, 3], after[1, :, 2, 3], atol=1e-6).all()


def test_where_tokens_are_turns_with_them():
    # There are no positions: mirroring an image mirrors its codes.
    torch.manual_seed(0)
    head, features = Head(6, CONFIG).double(), drawn(1, 6, 3, 4)
    torch.testing.assert_close(head(features.flip(3)), head(features).flip(3))


def test_a_block_that_started_as_the_identity_learns():
    head, features = Head(6, HeadConfig(kind="transformer", dim=6)).double(), drawn(1, 6, 2, 3)
    head.start_as_identity()
    assert torch.equal(head(features), features)
    head(features).square().sum().backward()
    assert head.block.layer.norm3.weight.grad.abs().sum() > 0
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        (head(features) - 1).square().sum().backward()
        optimizer.step()
    grads = {name: value.grad.abs().sum() for name, value in head.block.named_parameters()}
    # Softmax doesn't depend on what is added to all its inputs, so keys have no use for a bias.
    assert all(grad > 0 for grad in grads.values())


@pytest.mark.parametrize("size", [(1, 1), (7, 2)])
def test_grids_of_any_size_have_codes(size):
    head = Head(6, CONFIG).double()
    assert head(drawn(1, 6, *size)).shape == (1, 4, *size)


def test_dropout_falls_on_what_the_block_gives():
    torch.manual_seed(0)
    head, features = Head(6, CONFIG).double(), drawn(2, 6, 2, 2)
    nothing = torch.zeros(2, 6, 1, 1)
    code = head(features, (nothing, torch.ones(2, 6, 1, 1)))
    linear = head.linear.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(code, linear + head.nonlinear(head.block(features)))


def test_other_kinds_have_no_block():
    assert Head(6, HeadConfig(dim=4)).block is None
    assert not [name for name in Head(6, HeadConfig(dim=4)).state_dict() if "block" in name]

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stego_core.errors import ShapeError
from stego_core.model.objectness import balance_background, find_objectness


def planted(count=2000, seed=0):
    """Tokens of things and of surroundings along one direction, varied in others."""
    draw = np.random.default_rng(seed)
    is_thing = draw.random(count) < 0.3
    tokens = 0.1 * draw.normal(size=(count, 12))
    tokens[:, 0] += 1
    tokens[:, 1] += np.where(is_thing, 1.0, -0.5)
    return torch.from_numpy(tokens).float(), torch.from_numpy(is_thing)


@pytest.mark.parametrize("sign", [1, -1])
def test_things_are_told_from_surroundings_with_the_sign_of_the_pull(sign):
    tokens, is_thing = planted()
    pull = is_thing.float() + 2 * torch.randn(2000, generator=torch.Generator().manual_seed(1))
    found = sign * find_objectness(tokens, sign * pull)(tokens)
    assert found[is_thing].min() > found[~is_thing].max()
    assert float(found.mean()) == pytest.approx(0, abs=1e-4)
    assert float(found.std()) == pytest.approx(1, abs=1e-3)


def test_the_length_of_tokens_does_not_count():
    tokens, is_thing = planted()
    lengths = torch.rand(2000, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    found = find_objectness(tokens, is_thing.float())
    torch.testing.assert_close(found(tokens * lengths), found(tokens), atol=1e-4, rtol=0)


def test_other_tokens_are_measured_as_those_of_the_sample():
    tokens, is_thing = planted()
    others, _ = planted(seed=1)
    found = find_objectness(tokens, is_thing.float())
    together = found(torch.cat([tokens, others]))
    assert torch.equal(together[:2000], found(tokens))
    torch.testing.assert_close(together[2000:], found(others))


def test_each_token_needs_a_pull():
    with pytest.raises(ShapeError, match="give"):
        find_objectness(torch.zeros(4, 3), torch.zeros(3))


@given(seed=st.integers(0, 50), share=st.floats(0.02, 0.6))
def test_the_background_gets_its_share_of_the_weight(seed, share):
    objectness = torch.from_numpy(np.random.default_rng(seed).normal(size=500))
    weights = balance_background(objectness, share)(objectness)
    reached = float(weights[objectness < 0].sum() / weights.sum())
    before = float((objectness < 0).double().mean())
    assert reached == pytest.approx(min(share, before), abs=0.01)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-4)
    order = objectness.argsort()
    assert (weights[order].diff() >= 0).all()


def test_a_share_of_one_weighs_all_alike():
    objectness = torch.tensor([-2.0, 0.5, 1.5])
    assert torch.equal(balance_background(objectness, 1.0)(objectness), torch.ones(3))


def test_where_nothing_stands_out_all_count_alike():
    assert torch.equal(balance_background(torch.zeros(5), 0.1)(torch.zeros(5)), torch.ones(5))


def test_weights_do_not_depend_on_the_number_of_threads():
    tokens, is_thing = planted(60_000)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            objectness = find_objectness(tokens, is_thing.float())
            balance = balance_background(objectness(tokens), 0.1)
            found.append(balance(objectness(tokens[:1000])))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=1e-6)

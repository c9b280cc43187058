from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import options_reference as reference

from stego_core.errors import ShapeError
from stego_core.model.primaps import (
    NO_MASK,
    boost_prototypes,
    focal_loss,
    propose_masks,
    vote_in_masks,
)


def things(num_views=40, *, noise=0.2, stray=0.2, seed=0):
    """Views of 6 x 6 tokens in four quarters of one thing each, of three kinds of thing.

    Returns features (V, 9, 6, 6), which tell quarters apart; codes (V, 9, 6, 6) near the three
    kinds' directions, of which a share strays to another kind; the kind and quarter of each token.
    """
    generator = np.random.default_rng(seed)
    directions = np.linalg.qr(generator.normal(size=(9, 9)))[0]
    kinds = np.stack([generator.permutation(4) % 3 for _ in range(num_views)])
    quarter = np.arange(4).reshape(2, 2).repeat(3, 0).repeat(3, 1)
    owner = kinds[:, quarter]
    strays = generator.random(owner.shape) < stray
    seen = np.where(strays, (owner + 1) % 3, owner)
    features = directions[3:][quarter] + noise / 4 * generator.normal(size=(*owner.shape, 9))
    codes = directions[:3][seen] + noise * generator.normal(size=(*owner.shape, 9))
    maps = [torch.from_numpy(one.transpose(0, 3, 1, 2)).float() for one in (features, codes)]
    return *maps, torch.from_numpy(owner), torch.from_numpy(quarter), directions[:3]


def flat(maps):
    return maps.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("threshold", "coverage"), [(0.4, 0.95), (0.2, 1.0), (0.7, 0.6)])
def test_the_masks_are_those_of_the_loops(threshold, coverage):
    features = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    found = propose_masks(features, threshold=threshold, coverage=coverage)
    for image, tokens in zip(found, flat(features).double().numpy(), strict=True):
        expected = reference.mask_proposals(tokens, threshold, coverage)
        np.testing.assert_array_equal(image.flatten().numpy(), expected)


def test_the_masks_of_planted_things_are_the_things():
    features, _, _, quarter, _ = things()
    for masks in propose_masks(features):
        pairs = {*zip(masks.flatten().tolist(), quarter.flatten().tolist(), strict=True)}
        assert len(pairs) == len({mask for mask, _ in pairs}) == 4
        assert sorted(mask for mask, _ in pairs) == [0, 1, 2, 3]


def test_neither_the_sign_nor_the_other_images_of_a_batch_count():
    features = things(6)[0]
    found = propose_masks(features)
    assert torch.equal(propose_masks(-features), found)
    alone = torch.cat([propose_masks(one[None]) for one in features])
    assert torch.equal(alone, found)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_image_of_equal_tokens_ends(value):
    masks = propose_masks(torch.full((1, 3, 4, 4), value))
    # Without features tokens are unlike even themselves; with the same they are one mask.
    assert len(masks.unique()) == (1 if value else 16)


def test_noise_ends_at_the_largest_number_of_masks():
    noise = torch.randn(1, 60, 12, 12, generator=torch.Generator().manual_seed(0))
    masks = propose_masks(noise, threshold=0.99)
    assert masks.max() == 63
    assert (masks == NO_MASK).sum() == 144 - 64


def test_features_of_another_rank_are_refused():
    with pytest.raises(ShapeError, match="B, D, h, w"):
        propose_masks(torch.zeros(3, 4))


def test_the_majority_of_a_mask_decides_and_tokens_without_a_mask_get_nothing():
    ids = torch.tensor([[2, 2, 0, 1, 0, 1], [0, 1, 2, 2, 2, 2]])
    masks = torch.tensor([[0, 0, 0, 1, 1, -1], [-1, -1, -1, -1, 3, 3]])
    expected = [[2, 2, 2, 0, 0, -1], [-1, -1, -1, -1, 2, 2]]  # of equals the lowest
    assert vote_in_masks(ids, masks, 3).tolist() == expected
    assert vote_in_masks(ids, torch.full_like(masks, -1), 3).eq(NO_MASK).all()


def test_the_focal_loss_is_that_of_the_loops():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, -1, 1, 1, 0, -1])
    expected = reference.focal_loss(logits.detach().numpy(), labels.numpy())
    assert focal_loss(logits, labels).item() == pytest.approx(expected, rel=1e-12)


def boosted(start, *, seed=0, **options):
    features, codes, owner, _, _ = things()
    masks = propose_masks(features).flatten(1)
    found = boost_prototypes(flat(codes), masks, start, seed=seed, **options)
    return found, flat(codes), owner.flatten(1)


def test_the_vote_rights_tokens_and_mixed_prototypes_part_into_the_planted_kinds():
    directions = torch.from_numpy(things()[4]).float()
    mixed = F.normalize(directions + 0.6 * directions.roll(1, 0), dim=1)
    found, codes, owner = boosted(mixed)
    ids = (codes @ mixed.T).argmax(2)
    voted = vote_in_masks(ids, propose_masks(things()[0]).flatten(1), 3)
    assert (ids == owner).float().mean() < 0.8
    assert (voted == owner).float().mean() > 0.95
    kinds = torch.arange(3000) % 3
    noise = torch.randn(3000, 9, generator=torch.Generator().manual_seed(1))
    points = directions[kinds] + 0.5 * noise
    before, after, best = (
        float(((points @ rows.T).argmax(1) == kinds).float().mean())
        for rows in (mixed, found, directions)
    )
    assert before < best - 0.1
    assert after > best - 0.04


def test_the_seed_decides_the_result_and_no_step_changes_nothing():
    start = F.normalize(torch.randn(3, 9, generator=torch.Generator().manual_seed(1)), dim=1)
    first, again = (boosted(start, seed=4, steps=30)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, boosted(start, seed=5, steps=30)[0])
    torch.testing.assert_close(boosted(start, steps=0)[0], start)


def test_tokens_without_a_mask_teach_nothing():
    start = torch.from_numpy(things()[4]).float()
    codes = flat(things()[1])
    nothing = torch.full(codes.shape[:2], NO_MASK)
    torch.testing.assert_close(boost_prototypes(codes, nothing, start, seed=0, steps=20), start)

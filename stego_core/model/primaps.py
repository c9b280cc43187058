"""PriMaPs: mask proposals along an image's principal directions, and prototypes fitted to them.

Letters in names: B images, D feature channels, h w grid, T = h w tokens of an image, V images that
are fitted on, K code channels, M prototypes, P tokens of a step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.errors import ShapeError

# From the published code.
_THRESHOLD = 0.4
_COVERAGE = 0.95
_STEP_VIEWS = 32
_LEARNING_RATE = 5e-3
_FOCUS = 2.0
_DECAY, _DECAY_STEPS = 0.98, 10
# Fifty epochs of 320 images, about what the published schedule is for a small set.
_STEPS = 500
# Features that resemble nothing would give a mask for every token.
_MOST_MASKS = 64
# The source multiplies by the length of its features; lengths of codes mean nothing here.
_TEMPERATURE = 0.1

NO_MASK = -1


def propose_masks(
    features_BDhw: Tensor, *, threshold: float = _THRESHOLD, coverage: float = _COVERAGE
) -> Tensor:
    """Split images into masks of tokens that resemble the most extreme token of a direction.

    Of the tokens that no mask has yet the first principal direction is taken; the token whose
    features lie nearest to it, on either side, is the seed; the mask is all of these tokens whose
    cosine with the seed reaches the threshold. This goes on until the masks cover the image.

    Args:
        features_BDhw: features, (B, D, h, w); need not be normalised.
        threshold: smallest cosine with the seed, in (0, 1].
        coverage: share of the tokens in masks at which an image is done, (0, 1].

    Returns:
        The mask of each token, numbered from 0 in the order of finding, `NO_MASK` for the rest:
        (B, h, w) int64. An image has at most 64 masks.

    Raises:
        ShapeError: if the features aren't four-dimensional.
    Source: Hahn et al., "Boosting Unsupervised Semantic Segmentation with Principal Mask
        Proposals", TMLR 2024. They refine masks by a median filter and a CRF at the image's size,
        and take the side that the direction's sign happens to point to.
    """
    if features_BDhw.ndim != 4:
        raise ShapeError(f"features {tuple(features_BDhw.shape)}: give (B, D, h, w)")
    tokens_BTD = features_BDhw.flatten(2).transpose(1, 2).float()
    unit_BTD = F.normalize(tokens_BTD, dim=2)
    masks_BT = torch.full(tokens_BTD.shape[:2], NO_MASK, device=tokens_BTD.device)
    for number in range(_MOST_MASKS):
        is_free_BT = masks_BT == NO_MASK
        unfinished = (is_free_BT.double().mean(1) > 1 - coverage).nonzero()[:, 0]
        if not len(unfinished):
            break
        is_free, unit = is_free_BT[unfinished], unit_BTD[unfinished]
        seeds = _choose_seeds(tokens_BTD[unfinished], unit, is_free)
        cosines = torch.einsum("btd,bd->bt", unit, unit[torch.arange(len(seeds)), seeds])
        taken = is_free & (cosines >= threshold)
        # A token without features resembles nothing, not even itself.
        taken[torch.arange(len(seeds)), seeds] = True
        masks_BT[unfinished] = masks_BT[unfinished].where(~taken, number)
    return masks_BT.view(len(features_BDhw), *features_BDhw.shape[2:])


def _choose_seeds(tokens_BTD: Tensor, unit_BTD: Tensor, is_free_BT: Tensor) -> Tensor:
    """Return the free token of each image that lies nearest to the free tokens' direction, (B,)."""
    shares_BT1 = (is_free_BT / is_free_BT.sum(1, keepdim=True))[:, :, None].to(tokens_BTD)
    centred = tokens_BTD - (tokens_BTD * shares_BT1).sum(1, keepdim=True)
    covariance_BDD = centred.transpose(1, 2) @ (centred * shares_BT1)
    direction_BD = torch.linalg.eigh(covariance_BDD).eigenvectors[:, :, -1]
    # Either sign is an eigenvector: the side that has the more extreme token counts.
    nearness_BT = torch.einsum("btd,bd->bt", unit_BTD, direction_BD).abs()
    return nearness_BT.masked_fill(~is_free_BT, -1).argmax(1)


def vote_in_masks(ids_BT: Tensor, masks_BT: Tensor, count: int) -> Tensor:
    """Give all tokens of a mask the id that most of them have; the lowest of equals.

    Args:
        ids_BT: prototype of each token, (B, T) int64 in [0, count).
        masks_BT: mask of each token, (B, T), see `propose_masks`.
        count: M, number of prototypes.

    Returns:
        Ids, (B, T) int64; `NO_MASK` where a token has no mask.
    """
    batch = len(masks_BT)
    num_masks = max(int(masks_BT.max()) + 1, 1)
    is_inside = masks_BT != NO_MASK
    places = masks_BT.clamp(min=0) * count + ids_BT
    votes = torch.zeros(batch, num_masks * count, device=ids_BT.device)
    votes.scatter_add_(1, places, is_inside.to(votes))
    winners = votes.view(batch, num_masks, count).argmax(2)
    return winners.gather(1, masks_BT.clamp(min=0)).where(is_inside, NO_MASK)


def focal_loss(logits_PM: Tensor, labels_P: Tensor) -> Tensor:
    """Compute a cross-entropy in which prototypes that are predicted much count little.

    A token's loss counts with (1 - s)², s the mean probability of its label over the tokens.

    Args:
        logits_PM: logits, (P, M).
        labels_P: prototype of each token, (P,) int64; `NO_MASK` doesn't count.

    Returns:
        The mean over all P tokens, a scalar.
    """
    focus_M = (1 - logits_PM.detach().softmax(1).mean(0)) ** _FOCUS
    losses = F.cross_entropy(
        logits_PM, labels_P, weight=focus_M, ignore_index=NO_MASK, reduction="none"
    )
    return losses.mean()


def boost_prototypes(
    codes_VTK: Tensor, masks_VT: Tensor, start_MK: Tensor, *, seed: int, steps: int = _STEPS
) -> Tensor:
    """Fit prototypes to mask proposals by stochastic expectation-maximisation (PriMaPs-EM).

    In each step a batch of images is labelled by a moving average of the prototypes, by majority
    in each mask, and the prototypes learn these labels by the focal loss.

    Args:
        codes_VTK: codes, (V, T, K); only their directions count.
        masks_VT: mask of each token, (V, T), see `propose_masks`.
        start_MK: where the prototypes start, (M, K).
        seed: of the batches.
        steps: of Adam; 0 returns the start.

    Returns:
        The moving average, unit rows, (M, K), on the codes' device.
    Source: see `propose_masks`. There the student sees augmented images and has a trained length
        for each prototype, which would favour prototypes; here prototypes are directions alone.
    """
    unit_VTK = F.normalize(codes_VTK, dim=2)
    average_MK = F.normalize(start_MK, dim=1).to(unit_VTK)
    trained_MK = average_MK.clone().requires_grad_()
    optimizer = torch.optim.Adam([trained_MK], lr=_LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        picks = torch.randperm(len(unit_VTK), generator=generator)[:_STEP_VIEWS]
        codes, masks = unit_VTK[picks], masks_VT[picks]
        ids = (codes @ F.normalize(average_MK, dim=1).T).argmax(2)
        labels = vote_in_masks(ids, masks, len(start_MK))
        with torch.enable_grad():
            logits = codes @ F.normalize(trained_MK, dim=1).T / _TEMPERATURE
            loss = focal_loss(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if step % _DECAY_STEPS == 0:
            average_MK = average_MK.lerp(trained_MK.detach(), 1 - _DECAY)
    return F.normalize(average_MK, dim=1)

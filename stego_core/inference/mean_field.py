"""Dense CRF by mean-field inference in torch: what pydensecrf computes, several times faster.

Legend: B images of one size, N clusters, C channels (clusters that matter in an image, one for the
    rest, and what fills up to the most of an image in the batch), H W P pixels.

Source: Krähenbühl and Koltun 2011, "Efficient inference in fully connected CRFs with Gaussian edge
    potentials", equation 4 and algorithm 1; kernels normalised symmetrically, as pydensecrf does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stego_core.errors import ShapeError
from stego_core.inference.lattice import Lattice

ITERATIONS = 10
GAUSSIAN_SXY, GAUSSIAN_COMPAT = 1, 3
BILATERAL_SXY, BILATERAL_SRGB, BILATERAL_COMPAT = 67, 3, 4

_RADIUS = 3  # of the Gaussian kernel, in standard deviations
# The bilateral message changes slowly: at these iterations it is extrapolated from the two before.
_EXTRAPOLATED = (2, 4, 6, 8)


def refine_mean_field(
    pixels_BHW3: Tensor, log_probs_BNHW: Tensor, *, tolerance: float = 0.0, is_exact: bool = False
) -> Tensor:
    """Return the label maps of a batch after mean-field inference.

    Only clusters that come near the top somewhere in an image are told apart there. All others
    share one channel, which keeps their mass; its message is divided among them evenly. Images
    don't see each other: together they have the labels that each has alone, up to rounding.

    Args:
        pixels_BHW3: uint8 RGB.
        log_probs_BNHW: log probabilities, float32, on the same device.
        tolerance: how far below the best cluster's log probability a cluster may stay everywhere
            and still be told apart; infinity tells all apart.
        is_exact: compute the bilateral message at every iteration.

    Returns:
        (B, H, W) int64.

    Raises:
        ShapeError: if the sizes disagree.
    """
    batch, _, height, width = log_probs_BNHW.shape
    if pixels_BHW3.shape != (batch, height, width, 3):
        sizes = f"{tuple(pixels_BHW3.shape)} pixels for {batch} scores of {height} x {width}"
        raise ShapeError(f"the CRF was given {sizes}")
    with torch.inference_mode():
        kept = _clusters_that_matter(log_probs_BNHW, tolerance)
        if all(len(clusters) == 1 for clusters in kept):
            return torch.cat(kept)[:, None, None].repeat(1, height, width)
        scores_CBP, share_CB1 = _channels(log_probs_BNHW, kept)
        bilateral = _Bilateral(pixels_BHW3, len(scores_CBP))
        gaussian = _Gaussian(height, width, scores_CBP)
        skipped = () if is_exact else _EXTRAPOLATED
        q_CBP = torch.softmax(scores_CBP, 0)
        earlier_CBP, message_CBP, logits_CBP = (torch.empty_like(scores_CBP) for _ in range(3))
        gap = 1  # iterations between the two latest messages
        for iteration in range(ITERATIONS):
            if iteration in skipped:
                torch.lerp(earlier_CBP, message_CBP, 1 + 1 / gap, out=logits_CBP)
                logits_CBP += gaussian(q_CBP)
            else:
                gap = 2 if iteration - 1 in skipped else 1
                earlier_CBP, message_CBP = message_CBP, bilateral(q_CBP, out=earlier_CBP)
                torch.add(message_CBP, gaussian(q_CBP), out=logits_CBP)
            torch.addcmul(scores_CBP, logits_CBP, share_CB1, out=logits_CBP)
            torch.softmax(logits_CBP, 0, out=q_CBP)
        best = [
            clusters.take(_best(q_CBP[: len(clusters), image]))
            for image, clusters in enumerate(kept)
        ]
        return torch.stack(best).view(batch, height, width)


def _clusters_that_matter(log_probs_BNHW: Tensor, tolerance: float) -> list[Tensor]:
    """Return the clusters that each image tells apart, in rising order."""
    floor_B1HW = log_probs_BNHW.amax(1, keepdim=True) - tolerance
    is_near = (log_probs_BNHW >= floor_B1HW).flatten(2).view(torch.uint8)
    # Several times faster than any(2).
    return [of_image.nonzero()[:, 0] for of_image in is_near.amax(2)]


def _best(q_CP: Tensor) -> Tensor:
    """Return argmax over channels (P,); torch's own is slow along the first of few channels."""
    best = torch.zeros(q_CP.shape[1], dtype=torch.long, device=q_CP.device)
    most = q_CP[0].clone()
    for channel in range(1, len(q_CP)):
        best.masked_fill_(q_CP[channel] > most, channel)
        torch.maximum(most, q_CP[channel], out=most)
    return best


def _channels(log_probs_BNHW: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the scores of the channels and what share of a message each of their clusters gets.

    Args:
        log_probs_BNHW: log probabilities.
        kept: the clusters that each image tells apart.

    Returns:
        (C, B, P), an image's clusters, then its rest, then channels without probability; (C, B, 1).
    """
    batch, count, height, width = log_probs_BNHW.shape
    most = min(max(map(len, kept)) + 1, count)
    scores_CBP = log_probs_BNHW.new_full((most, batch, height * width), -torch.inf)
    share_CB1 = log_probs_BNHW.new_ones(most, batch, 1)
    for image, clusters in enumerate(kept):
        apart, dropped = len(clusters), count - len(clusters)
        known = log_probs_BNHW[image].index_select(0, clusters).flatten(1)
        scores_CBP[:apart, image] = known
        if dropped:
            scores_CBP[apart, image] = (1 - known.exp().sum(0)).clamp_min(1e-10).log()
            share_CB1[apart, image] = 1 / dropped
    return scores_CBP, share_CB1


class _Bilateral:
    """Messages between pixels of an image that are near in place and colour."""

    def __init__(self, pixels_BHW3: Tensor, num_channels: int) -> None:
        batch, height, width, _ = pixels_BHW3.shape
        features = pixels_BHW3.new_empty((5, batch, height, width), dtype=torch.float32)
        features[0] = torch.arange(width, device=features.device) / BILATERAL_SXY
        features[1] = torch.arange(height, device=features.device)[:, None] / BILATERAL_SXY
        features[2:] = pixels_BHW3.permute(3, 0, 1, 2) / BILATERAL_SRGB
        # Q is a pixel of any image of the batch.
        features_dQ = features.flatten(1)
        self._lattice = Lattice(features_dQ, sets=batch)
        self._values_QC = features.new_empty(features_dQ.shape[1], num_channels)
        # Half of the weight before, half after filtering: the normalisation is symmetric.
        ones = features.new_ones(features_dQ.shape[1], 1)
        self._norm_Q = math.sqrt(BILATERAL_COMPAT) * self._lattice.filter(ones)[:, 0].rsqrt()

    def __call__(self, q_CBP: Tensor, *, out: Tensor) -> Tensor:
        torch.mul(q_CBP.flatten(1), self._norm_Q, out=self._values_QC.T)
        filtered_QC = self._lattice.filter(self._values_QC, out=self._values_QC)
        torch.mul(filtered_QC.T, self._norm_Q, out=out.view(len(q_CBP), -1))
        return out


class _Gaussian:
    """Messages between pixels that are near in place: a separable convolution."""

    def __init__(self, height: int, width: int, like_CBP: Tensor) -> None:
        self._size = (height, width)
        places = torch.arange(_RADIUS * GAUSSIAN_SXY + 1, dtype=torch.float64)
        self._kernel = torch.exp(-0.5 * (places / GAUSSIAN_SXY) ** 2).tolist()
        self._buffers = [like_CBP.new_empty(*like_CBP.shape[:2], height, width) for _ in range(2)]
        norms = [
            self._blur(like_CBP.new_ones(size), like_CBP.new_empty(size), 0).rsqrt()
            for size in self._size
        ]
        self._norm_HW = math.sqrt(GAUSSIAN_COMPAT) * norms[0][:, None] * norms[1]

    def __call__(self, q_CBP: Tensor) -> Tensor:
        first, second = self._buffers
        torch.mul(q_CBP.view_as(first), self._norm_HW, out=first)
        self._blur(self._blur(first, second, 2), first, 3)
        return first.mul_(self._norm_HW).view_as(q_CBP)

    def _blur(self, source: Tensor, target: Tensor, axis: int) -> Tensor:
        # Shifted sums are faster than torch's convolution of a few channels on a CPU.
        size = source.shape[axis]
        torch.mul(source, self._kernel[0], out=target)
        for shift, weight in enumerate(self._kernel[1:size], 1):
            near, far = (
                source.narrow(axis, 0, size - shift),
                source.narrow(axis, shift, size - shift),
            )
            target.narrow(axis, shift, size - shift).add_(near, alpha=weight)
            target.narrow(axis, 0, size - shift).add_(far, alpha=weight)
        return target

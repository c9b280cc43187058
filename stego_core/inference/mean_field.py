"""Dense CRF by mean-field inference in torch: what pydensecrf computes, several times faster.

Legend: N clusters, C channels (clusters that matter, and one for the rest), H W P pixels.

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
    pixels_HW3: Tensor, log_probs_NHW: Tensor, *, tolerance: float = 0.0, is_exact: bool = False
) -> Tensor:
    """Return the label map after mean-field inference.

    Only clusters that come near the top somewhere are told apart. All others share one channel,
    which keeps their mass; its message is divided among them evenly.

    Args:
        pixels_HW3: uint8 RGB.
        log_probs_NHW: log probabilities, float32, on the same device.
        tolerance: how far below the best cluster's log probability a cluster may stay everywhere
            and still be told apart; infinity tells all apart.
        is_exact: compute the bilateral message at every iteration.

    Returns:
        (H, W) int64.

    Raises:
        ShapeError: if the sizes disagree.
    """
    height, width = log_probs_NHW.shape[1:]
    if pixels_HW3.shape != (height, width, 3):
        raise ShapeError(f"{pixels_HW3.shape} pixels for scores of {height} x {width}")
    with torch.inference_mode():
        floor_HW = log_probs_NHW.amax(0) - tolerance
        is_near = (log_probs_NHW >= floor_HW).flatten(1).view(torch.uint8)
        kept = is_near.amax(1).nonzero()[:, 0]  # several times faster than any(1)
        if len(kept) == 1:
            return kept.expand(height * width).view(height, width).clone()
        scores_CP, share_C1 = _channels(log_probs_NHW, kept)
        bilateral = _Bilateral(pixels_HW3, len(scores_CP))
        gaussian = _Gaussian(height, width, scores_CP)
        skipped = () if is_exact else _EXTRAPOLATED
        q_CP = torch.softmax(scores_CP, 0)
        earlier_CP, message_CP, logits_CP = (torch.empty_like(scores_CP) for _ in range(3))
        gap = 1  # iterations between the two latest messages
        for iteration in range(ITERATIONS):
            if iteration in skipped:
                torch.lerp(earlier_CP, message_CP, 1 + 1 / gap, out=logits_CP)
                logits_CP += gaussian(q_CP)
            else:
                gap = 2 if iteration - 1 in skipped else 1
                earlier_CP, message_CP = message_CP, bilateral(q_CP, out=earlier_CP)
                torch.add(message_CP, gaussian(q_CP), out=logits_CP)
            torch.addcmul(scores_CP, logits_CP, share_C1, out=logits_CP)
            torch.softmax(logits_CP, 0, out=q_CP)
        return kept.take(_best(q_CP[: len(kept)])).view(height, width)


def _best(q_CP: Tensor) -> Tensor:
    """Return argmax over channels (P,); torch's own is slow along the first of few channels."""
    best = torch.zeros(q_CP.shape[1], dtype=torch.long, device=q_CP.device)
    most = q_CP[0].clone()
    for channel in range(1, len(q_CP)):
        best.masked_fill_(q_CP[channel] > most, channel)
        torch.maximum(most, q_CP[channel], out=most)
    return best


def _channels(log_probs_NHW: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of the channels (C, P) and what share of a message each cluster gets."""
    scores = log_probs_NHW.index_select(0, kept).flatten(1)
    share = scores.new_ones(len(scores), 1)
    dropped = len(log_probs_NHW) - len(kept)
    if dropped:
        mass = (1 - scores.exp().sum(0, keepdim=True)).clamp_min(1e-10)
        scores = torch.cat([scores, mass.log()])
        share = torch.cat([share, share.new_full((1, 1), 1 / dropped)])
    return scores, share


class _Bilateral:
    """Messages between pixels that are near in place and colour."""

    def __init__(self, pixels_HW3: Tensor, num_channels: int) -> None:
        height, width, _ = pixels_HW3.shape
        features = pixels_HW3.new_empty((5, height, width), dtype=torch.float32)
        features[0] = torch.arange(width, device=features.device) / BILATERAL_SXY
        features[1] = torch.arange(height, device=features.device)[:, None] / BILATERAL_SXY
        features[2:] = pixels_HW3.permute(2, 0, 1) / BILATERAL_SRGB
        self._lattice = Lattice(features.flatten(1))
        self._values_PC = features.new_empty(height * width, num_channels)
        # Half of the weight before, half after filtering: the normalisation is symmetric.
        ones = features.new_ones(height * width, 1)
        self._norm_P = math.sqrt(BILATERAL_COMPAT) * self._lattice.filter(ones)[:, 0].rsqrt()

    def __call__(self, q_CP: Tensor, *, out: Tensor) -> Tensor:
        torch.mul(q_CP, self._norm_P, out=self._values_PC.T)
        filtered_PC = self._lattice.filter(self._values_PC, out=self._values_PC)
        return torch.mul(filtered_PC.T, self._norm_P, out=out)


class _Gaussian:
    """Messages between pixels that are near in place: a separable convolution."""

    def __init__(self, height: int, width: int, like_CP: Tensor) -> None:
        self._size = (height, width)
        places = torch.arange(_RADIUS * GAUSSIAN_SXY + 1, dtype=torch.float64)
        self._kernel = torch.exp(-0.5 * (places / GAUSSIAN_SXY) ** 2).tolist()
        self._buffers = [like_CP.new_empty(len(like_CP), height, width) for _ in range(2)]
        norms = [
            self._blur(like_CP.new_ones(size), torch.empty_like(like_CP[0, :size]), 0).rsqrt()
            for size in self._size
        ]
        self._norm_HW = math.sqrt(GAUSSIAN_COMPAT) * norms[0][:, None] * norms[1]

    def __call__(self, q_CP: Tensor) -> Tensor:
        first, second = self._buffers
        torch.mul(q_CP.view(-1, *self._size), self._norm_HW, out=first)
        self._blur(self._blur(first, second, 1), first, 2)
        return first.mul_(self._norm_HW).flatten(1)

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

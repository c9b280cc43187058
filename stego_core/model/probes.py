"""The two probes on top of the code: clusters without labels, a linear classifier with labels.

Letters in names: B images, K code channels, N clusters or classes, h w grid, P label pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stego_core.errors import ShapeError

# Below this length a vector counts as zero: it keeps a cosine of 0 with everything.
_SMALLEST_NORM = 1e-10


class ClusterProbe(nn.Module):
    """Tell clusters apart by the cosine of the code with one direction per cluster.

    Args:
        dim: K, channels of the code.
        count: N, number of clusters.
    Source: Hamilton et al. 2022, section 3: mini-batch k-means by cosine distance.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.clusters = nn.Parameter(torch.randn(count, dim))

    def scores(self, code_BKhw: Tensor) -> Tensor:
        """Compute the cosine of every code with every cluster.

        Args:
            code_BKhw: code, (B, K, h, w), at any size.

        Returns:
            Cosines in [-1, 1], (B, N, h, w).

        Raises:
            ShapeError: if the code has another number of channels.
        """
        _check_code(code_BKhw, self.clusters.shape[1])
        directions = F.normalize(self.clusters, dim=1, eps=_SMALLEST_NORM)
        unit_code = F.normalize(code_BKhw, dim=1, eps=_SMALLEST_NORM)
        return F.conv2d(unit_code, directions[:, :, None, None])

    def loss(self, code_BKhw: Tensor, alpha: float | None = None) -> Tensor:
        """Compute the mean negative cosine of codes with their clusters.

        The gradient reaches the clusters only: the probe never shapes the code.

        Args:
            code_BKhw: code, (B, K, h, w).
            alpha: sharpness of a soft assignment, softmax(alpha * cosine). None assigns each
                code to its best cluster alone.

        Returns:
            A scalar in [-1, 1].

        Raises:
            ShapeError: if the code has another number of channels.
        """
        scores = self.scores(code_BKhw.detach())
        if alpha is None:
            return -scores.max(dim=1).values.mean()
        return -(torch.softmax(alpha * scores, dim=1) * scores).sum(dim=1).mean()

    def log_probs(self, code_BKhw: Tensor, alpha: float) -> Tensor:
        """Compute log-probabilities of the clusters, log softmax(alpha * cosine).

        Args:
            code_BKhw: code, (B, K, h, w), at any size.
            alpha: sharpness; the method uses 2.

        Returns:
            Log-probabilities, (B, N, h, w).

        Raises:
            ShapeError: if the code has another number of channels.
        """
        return torch.log_softmax(alpha * self.scores(code_BKhw), dim=1)


class LinearProbe(nn.Module):
    """Classify the code by a linear map; needs labels and serves evaluation only.

    Args:
        dim: K, channels of the code.
        count: N, number of classes.
    Source: Hamilton et al. 2022, section 4.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(dim, count, kernel_size=1)

    def forward(self, code_BKhw: Tensor) -> Tensor:
        """Compute the logits of the classes, (B, N, h, w), of a code (B, K, h, w).

        Raises:
            ShapeError: if the code has another number of channels.
        """
        _check_code(code_BKhw, self.classifier.in_channels)
        logits: Tensor = self.classifier(code_BKhw)
        return logits

    def loss(
        self,
        code_BKhw: Tensor,
        labels: Tensor,
        coords: Tensor,
        *,
        num_valid: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the cross-entropy of the classes at labelled pixels.

        Logits are sampled bilinearly, which at the pixel centres of a label map equals resizing
        them to that map's size. The gradient reaches the probe only, never the code.

        Args:
            code_BKhw: code, (B, K, h, w).
            labels: class ids at P pixels of each image, (B, P) int64; pixels with an id outside
                [0, N), such as 255, don't count.
            coords: the pixels as (x, y), (B, P, 2); -1 and 1 are the outer edges of the image
                (`align_corners=False`), so column x of W lies at (2 x + 1) / W - 1.
            num_valid: divide the sum over pixels by this, not by the number of pixels that
                count. Workers that share a batch and average gradients pass the mean over all
                ranks.

        Returns:
            The mean over pixels that count, a scalar; exactly 0 if none does.

        Raises:
            ShapeError: if the shapes disagree.
        """
        batch, pixels = labels.shape[0], labels.shape[-1]
        if labels.shape != (len(code_BKhw), pixels) or coords.shape != (batch, pixels, 2):
            raise ShapeError(
                f"code {tuple(code_BKhw.shape)}, labels {tuple(labels.shape)}, pixels "
                f"{tuple(coords.shape)}: give (B, K, h, w), (B, P) and (B, P, 2)"
            )
        logits = self(code_BKhw.detach())
        sampled = F.grid_sample(
            logits,
            coords[:, None].to(logits.dtype),
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )[:, :, 0]
        counts = (labels >= 0) & (labels < logits.shape[1])
        total = F.cross_entropy(sampled, labels.where(counts, -100), reduction="sum")
        if num_valid is None:
            num_valid = counts.sum()
        divisor = torch.as_tensor(num_valid, dtype=total.dtype, device=total.device)
        # A sum over no pixels is 0 and keeps its graph; only the division could spoil it.
        return total / divisor.clamp(min=1e-6)


def _check_code(code_BKhw: Tensor, dim: int) -> None:
    if code_BKhw.ndim != 4 or code_BKhw.shape[1] != dim:
        raise ShapeError(f"code {tuple(code_BKhw.shape)}: this probe needs (B, {dim}, h, w)")

"""One training step: the trained modules, and from a batch to its losses.

Legend: b views of this worker, B of the whole batch, C feature channels, K code channels,
h w grid, S x S sampled points, R random partners.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stego_core.config.method import PairConfig
from stego_core.config.schema import TrainJob
from stego_core.loss.alignment import alignment_loss
from stego_core.loss.correspondence import (
    correspondence_loss,
    correspondence_mean,
)
from stego_core.loss.crf import crf_loss
from stego_core.loss.points import PointRows, locate, sample_rows
from stego_core.loss.reconstruction import reconstruction_loss
from stego_core.loss.salience import one_hot_labels, salient_points
from stego_core.model.head import Head
from stego_core.model.probes import ClusterProbe, LinearProbe
from stego_core.model.whitening import Whitening
from stego_core.training.optional import OptionalInputs
from stego_core.training.sampler import StepDraws


@dataclass(frozen=True, slots=True)
class StepBatch:
    """This worker's share of a batch.

    Attributes:
        anchor: (b, C, h, w) features.
        neighbor: (b, C, h, w) features.
        draws: of the whole batch.
        rows: this worker's rows of the draws.
        labels: (b, P) int64 and their points (b, P, 2), or None without labels.
        optional: what optional losses and studies need.
    """

    anchor: Tensor
    neighbor: Tensor
    draws: StepDraws
    rows: slice
    labels: tuple[Tensor, Tensor] | None
    optional: OptionalInputs = OptionalInputs()  # noqa: RUF009 - frozen, all None


class _GatherRows(torch.autograd.Function):
    """Concatenate the rows of all workers; gradients flow back to the worker that made them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.count
        return total[start : start + ctx.count]


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all workers in rank order; without other workers, the rows."""
    gathered: Tensor = rows
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered = _GatherRows.apply(rows)
    return gathered


def mean_over_workers(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all workers, without gradient."""
    value = value.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


class Trainable(nn.Module):
    """Head and probes: all that is trained, and all that workers synchronise.

    Args:
        job: the configuration.
        channels: C of the features, after whitening if there is one.
        num_classes: of the labels; 0 builds no linear probe.
        shifts: the shift of each kind of pair.
        whitening: of the features, part of the state but not trained; None leaves them as they are.
    """

    def __init__(
        self,
        job: TrainJob,
        *,
        channels: int,
        num_classes: int,
        shifts: dict[str, float],
        whitening: Whitening | None = None,
    ) -> None:
        super().__init__()
        self.whitening = whitening
        # Its own generator state, so that what ran before can't change the initial weights.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            self.head = Head(channels, job.head)
            if whitening is not None:
                self.head.start_as_identity()
            dim = self.head.dim
            self.cluster_probe = ClusterProbe(dim, job.clusters.total)
            self.linear_probe = LinearProbe(dim, num_classes) if num_classes else None
            # The decoder of the reconstruction loss; it serves training only.
            self.decoder = nn.Conv2d(dim, channels, 1) if job.loss.reconstruction else None
        self._loss, self._compat, self._num_classes = job.loss, job.compat, num_classes
        self._shifts = shifts

    def whiten(self, features_BChw: Tensor) -> Tensor:
        """Return the features that teacher and head see."""
        if self.whitening is None:
            return features_BChw
        whitened: Tensor = self.whitening(features_BChw)
        return whitened

    def reset_probes(self, seed: int) -> None:
        """Give both probes new random weights, which follow from the seed alone."""
        count, dim = self.cluster_probe.clusters.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.cluster_probe.load_state_dict(ClusterProbe(dim, count).state_dict())
            if self.linear_probe is not None:
                fresh = LinearProbe(dim, self.linear_probe.classifier.out_channels)
                self.linear_probe.load_state_dict(fresh.state_dict())

    def forward(self, batch: StepBatch) -> dict[str, Tensor]:
        """Return the losses of this worker's rows, and what is worth logging.

        Returns:
            `total` with gradient; `self`, `knn`, `random`, `cluster`, `linear` losses, those of
            `reconstruction`, `alignment` and `crf` whose weight isn't 0, and the mean code
            correspondence of each kind of pair (`cd/self`, ...), the paper's collapse signal.
        """
        draws, rows = batch.draws, batch.rows
        keep = draws.keep[:, :, rows].to(batch.anchor)
        anchor, neighbor = self.whiten(batch.anchor), self.whiten(batch.neighbor)
        code = self.head(anchor, (keep[0, 0], keep[0, 1]))
        code_knn = self.head(neighbor, (keep[1, 0], keep[1, 1]))
        teacher, teacher_knn = anchor * keep[0, 2], neighbor * keep[1, 2]
        out = self._optional(batch.optional, code, teacher)
        if self._loss.oracle and batch.optional.labels is not None:
            teacher, teacher_knn = (
                one_hot_labels(labels, self._num_classes) for labels in batch.optional.labels
            )
        points, others = self._points(batch, code)
        f_points, f_others = points, others
        if teacher.shape[2:] != code.shape[2:]:
            f_points, f_others = self._points(batch, teacher)
        f1, c1 = sample_rows(teacher, f_points), sample_rows(code, points)
        out["self"], out["cd/self"] = self._pair("self", f1, f1, c1, c1)
        f2, c2 = sample_rows(teacher_knn, f_others), sample_rows(code_knn, others)
        out["knn"], out["cd/knn"] = self._pair("knn", f1, f2, c1, c2)
        all_features, all_codes = gather_rows(teacher), gather_rows(code)
        partners = draws.partners[:, rows].to(all_codes.device)
        random = [
            self._pair(
                "random",
                f1,
                sample_rows(all_features, f_others, which),
                c1,
                sample_rows(all_codes, others, which),
            )
            for which in partners
        ]
        out["random"], out["cd/random"] = (
            torch.stack(values).mean() for values in zip(*random, strict=True)
        )
        out["cluster"] = self.cluster_probe.loss(code)
        out["total"] = self._total(out)
        if self.linear_probe is not None and batch.labels is not None:
            labels, pixels = batch.labels
            valid = (labels >= 0) & (labels < self.linear_probe.classifier.out_channels)
            num_valid = mean_over_workers(valid.sum().float())
            out["linear"] = self.linear_probe.loss(code, labels, pixels, num_valid=num_valid)
            out["total"] = out["total"] + out["linear"]
        return out

    def _total(self, losses: dict[str, Tensor]) -> Tensor:
        total: Tensor = losses["cluster"] + sum(
            getattr(self._loss, kind).weight * losses[kind] for kind in ("self", "knn", "random")
        )
        for name in ("reconstruction", "alignment", "crf"):
            if name in losses:
                total = total + getattr(self._loss, name) * losses[name]
        return total

    def _points(self, batch: StepBatch, maps: Tensor) -> tuple[PointRows, PointRows]:
        """Return the points of anchors and of all others on the grid of some maps."""
        h, w = maps.shape[2:]
        optional = batch.optional
        drawn = (batch.draws.coords_anchor, batch.draws.coords_other)
        coords = [one[batch.rows].to(batch.anchor) for one in drawn]
        if optional.salience is not None and optional.labels is not None:
            coords = [
                salient_points(one, self._labelled(labels), salience, grid=(h, w))
                for one, labels, salience in zip(
                    coords, optional.labels, optional.salience, strict=True
                )
            ]
        return locate(coords[0], h, w), locate(coords[1], h, w)

    def _labelled(self, labels: Tensor) -> Tensor:
        return (labels >= 0) & (labels < self._num_classes)

    def _optional(
        self, inputs: OptionalInputs, code: Tensor, features: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of spec section 3.4 whose weight isn't 0."""
        out: dict[str, Tensor] = {}
        if self.decoder is not None:
            out["reconstruction"] = reconstruction_loss(self.decoder(code), features)
        if inputs.images is not None and inputs.crf_pixels is not None:
            out["crf"] = crf_loss(inputs.images, code, inputs.crf_pixels)
        if inputs.augmented is not None and inputs.coords is not None and inputs.keep is not None:
            keep = inputs.keep.to(inputs.augmented)
            augmented = self.head(self.whiten(inputs.augmented), (keep[0], keep[1]))
            transposed = self._compat.transposed_alignment
            out["alignment"] = alignment_loss(augmented, code, inputs.coords, transposed=transposed)
        return out

    def _pair(
        self, kind: str, f1: Tensor, f2: Tensor, c1: Tensor, c2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss of one kind of pair (spec 3.2) and its mean code correspondence."""
        config = self._loss
        pair: PairConfig = getattr(config, kind)
        mean = correspondence_mean(f1, f2)
        loss = correspondence_loss(
            f1,
            f2,
            c1,
            c2,
            shift=self._shifts.get(kind, pair.shift),
            pointwise=config.pointwise,
            zero_clamp=config.zero_clamp,
            stabilize=config.stabilize,
            global_mean=mean if self._compat.worker_mean else mean_over_workers(mean),
        )
        return loss.mean(), correspondence_mean(c1.detach(), c2.detach())

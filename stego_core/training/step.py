"""One training step: the trained modules, and from a batch to its losses.

Legend: b views of this worker, B of the whole batch, C channels of the features that teacher and
head see, K code channels, h w grid, S x S sampled points, R random partners.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stego_core.config.method import PairConfig, settled_loss
from stego_core.config.schema import TrainJob
from stego_core.loss.alignment import alignment_loss
from stego_core.loss.correspondence import correspondence_loss, correspondence_mean
from stego_core.loss.crf import crf_loss
from stego_core.loss.local_positives import mix_neighbors
from stego_core.loss.points import PointRows, locate, sample_rows
from stego_core.loss.reconstruction import reconstruction_loss
from stego_core.loss.salience import one_hot_labels, salient_points
from stego_core.loss.shifts import adaptive_shift
from stego_core.loss.smooth import (
    PROTOTYPE_DECAY,
    assign_softly,
    prototype_loss,
    smoothness_energy,
)
from stego_core.model.head import Head
from stego_core.model.probes import ClusterProbe, LinearProbe
from stego_core.model.whitening import Whitening
from stego_core.training.concepts import ConceptEnergy
from stego_core.training.ema import MovingAverage
from stego_core.training.optional import OptionalInputs
from stego_core.training.sampler import StepDraws
from stego_core.training.workers import gather_rows, mean_over_workers


@dataclass(frozen=True, slots=True)
class StepBatch:
    """This worker's share of a batch.

    Attributes:
        anchor: (b, C, h, w) features, whitened if there is a whitening.
        neighbor: (b, C, h, w), the same.
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


class Trainable(nn.Module):
    """Head and probes: all that is trained, and all that workers synchronise.

    Args:
        job: the configuration.
        channels: C of the features, after whitening if there is one.
        num_classes: of the labels; 0 builds no linear probe.
        shifts: the shift of each kind of pair.
        whitening: of the features, part of the state but not trained; None leaves them as they are.
        concepts: (M, channels) codebook of the concept energy; None with other energies.
    """

    def __init__(
        self,
        job: TrainJob,
        *,
        channels: int,
        num_classes: int,
        shifts: dict[str, float],
        whitening: Whitening | None = None,
        concepts: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.whitening, self._num_classes = whitening, num_classes
        # Its own generator state, so that what ran before can't change the initial weights.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            self.head = Head(channels, job.head)
            if whitening is not None:
                self.head.start_as_identity()
            dim = self.head.dim
            self.cluster_probe = ClusterProbe(dim, job.clusters.total)
            self.linear_probe = LinearProbe(dim, num_classes) if num_classes else None
            if self.linear_probe is not None and job.train.linear_refit:
                # Fitted after training; until then it only keeps the number of classes.
                self.linear_probe.requires_grad_(False)
            # The decoder of the reconstruction loss; it serves training only.
            self.decoder = nn.Conv2d(dim, channels, 1) if job.loss.reconstruction else None
        self.average = MovingAverage(self.head, job.train.ema) if job.train.ema else None
        # Of the prototypes, for the smoothness energy.
        self.teacher: MovingAverage[ClusterProbe] | None = None
        if job.loss.energy == "smooth":
            self.teacher = MovingAverage(self.cluster_probe, PROTOTYPE_DECAY)
        assert (job.loss.energy == "concept") == (concepts is not None)  # noqa: S101 - of our own
        self.concepts = None if concepts is None else ConceptEnergy(self.head, concepts)
        self._loss = settled_loss(job.loss, job.head)
        self._compat, self._shifts, self._alpha = job.compat, shifts, job.clusters.alpha

    @property
    def final_head(self) -> Head:
        """Return the head that becomes the model: the moving average, if there is one."""
        return self.head if self.average is None else self.average.shadow

    def follow(self) -> None:
        """Move the averages; called after each step of the optimisers."""
        if self.average is not None:
            self.average.follow(self.head)
        if self.teacher is not None:
            self.teacher.follow(self.cluster_probe)
        if self.concepts is not None:
            self.concepts.follow(self.head)

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
        if self.teacher is not None:
            self.teacher.restart(self.cluster_probe)

    def forward(self, batch: StepBatch) -> dict[str, Tensor]:
        """Return the losses of this worker's rows, and what is worth logging.

        Returns:
            `total` with gradient; `self`, `knn`, `random`, `cluster`, `linear` losses, those of
            `local`, `reconstruction`, `alignment` and `crf` whose weight isn't 0, and of each kind
            of pair the mean `correspondence/...` of codes, the paper's collapse signal. The
            smoothness energy has no `knn`; the concept energy has `concept` in place of pairs.
        """
        draws, rows = batch.draws, batch.rows
        anchor, neighbor = batch.anchor, batch.neighbor
        keep = draws.keep[:, :, rows].to(anchor)
        code = self.head(anchor, (keep[0, 0], keep[0, 1]))
        has_knn = self._loss.energy == "correspondence"
        codes = (code, self.head(neighbor, (keep[1, 0], keep[1, 1])) if has_knn else None)
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
        places, features = (points, others, f_points, f_others), (teacher, teacher_knn)
        partners = draws.partners[:, rows].to(code.device)
        if self.concepts is not None:
            out["concept"] = self.concepts(anchor, code, points, (keep[1, 0], keep[1, 1]))
        else:
            out |= self._pairs(features, codes, places, partners)
        if self._loss.local:
            near = None if codes[1] is None else mix_neighbors(codes[1], neighbor)
            mixed = (mix_neighbors(code, anchor), near)
            out["local"] = self._weighted(self._pairs(features, mixed, places, partners))
        out["cluster"] = self._cluster_loss(code)
        out["total"] = self._total(out)
        if self.linear_probe is not None and batch.labels is not None:
            labels, pixels = batch.labels
            valid = (labels >= 0) & (labels < self.linear_probe.classifier.out_channels)
            num_valid = mean_over_workers(valid.sum().float())
            out["linear"] = self.linear_probe.loss(code, labels, pixels, num_valid=num_valid)
            out["total"] = out["total"] + out["linear"]
        return out

    def _pairs(
        self,
        features: tuple[Tensor, Tensor],
        codes: tuple[Tensor, Tensor | None],
        places: tuple[PointRows, PointRows, PointRows, PointRows],
        partners_Rb: Tensor,
    ) -> dict[str, Tensor]:
        """Return loss and mean code correspondence of each kind of pair.

        Features and codes are those of anchors and neighbours, the places points and others in
        the codes, then in the features.
        """
        points, others, f_points, f_others = places
        code = self._compared(codes[0])
        f1, c1 = sample_rows(features[0], f_points), sample_rows(code, points)
        out = {}
        out["self"], out["correspondence/self"] = self._pair("self", f1, f1, c1, c1)
        if codes[1] is not None:
            f2, c2 = sample_rows(features[1], f_others), sample_rows(codes[1], others)
            out["knn"], out["correspondence/knn"] = self._pair("knn", f1, f2, c1, c2)
        all_features, all_codes = gather_rows(features[0]), gather_rows(code)
        random = [
            self._pair(
                "random",
                f1,
                sample_rows(all_features, f_others, which),
                c1,
                sample_rows(all_codes, others, which),
            )
            for which in partners_Rb
        ]
        out["random"], out["correspondence/random"] = (
            torch.stack(values).mean() for values in zip(*random, strict=True)
        )
        return out

    def _compared(self, code: Tensor) -> Tensor:
        """Return what a pair compares: codes, or their assignments to the teacher's prototypes."""
        if self.teacher is None:
            return code
        return assign_softly(code, self.teacher.shadow.clusters)

    def _cluster_loss(self, code: Tensor) -> Tensor:
        if self.teacher is None:
            return self.cluster_probe.loss(code, self._alpha)
        return prototype_loss(code, self.cluster_probe.clusters, self.teacher.shadow.clusters)

    def _weighted(self, losses: dict[str, Tensor]) -> Tensor:
        kinds = [kind for kind in ("self", "knn", "random") if kind in losses]
        total: Tensor = sum(getattr(self._loss, kind).weight * losses[kind] for kind in kinds)
        return total

    def _total(self, losses: dict[str, Tensor]) -> Tensor:
        total = losses["cluster"] + losses.get("concept", self._weighted(losses))
        for name in ("local", "reconstruction", "alignment", "crf"):
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
        """Return the optional losses of the original, those whose weight isn't 0."""
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
        """Return a pair kind's mean loss (paper, eq. 4) and mean code correspondence."""
        config = self._loss
        pair: PairConfig = getattr(config, kind)
        means = torch.stack(
            [correspondence_mean(f1, f2), correspondence_mean(c1.detach(), c2.detach())]
        )
        shared = means if self._compat.worker_mean else mean_over_workers(means)
        shift: float | Tensor = self._shifts.get(kind, pair.shift)
        if config.shifts == "adaptive":
            shift = adaptive_shift(kind, *shared)
        centring: Any = {"pointwise": config.pointwise, "global_mean": shared[0]}
        if self.teacher is not None:
            energy = smoothness_energy((f1, f2), (c1, c2), shift=shift, **centring)
            return energy.mean(), means[1]
        clamps: Any = {"zero_clamp": config.zero_clamp, "stabilize": config.stabilize}
        loss = correspondence_loss(f1, f2, c1, c2, shift=shift, **centring, **clamps)
        return loss.mean(), means[1]

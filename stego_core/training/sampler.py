"""Every random draw of a training step, made for the whole batch from seed and step alone.

Each worker makes the same draws and takes its rows of them. So the batch sequence depends neither
on the number of workers nor on where a run was interrupted, and there is no RNG state to save.

Legend: B views of the whole batch, C feature channels, S x S sampled points, P label pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from stego_core.config.schema import TrainJob
from stego_core.loss.correspondence import derangement, overlapping_permutation
from stego_core.model.head import dropout_masks
from stego_core.neighbors.search import NONE

_EPOCH_STREAM, _STEP_STREAM = 0, 1


@dataclass(frozen=True, slots=True)
class StepDraws:
    """The draws of one step.

    Attributes:
        anchors: (B,) views.
        neighbors: (B,) views, one mined neighbour of each anchor.
        coords_anchor: (B, S, S, 2) in [-1, 1], points of the anchor.
        coords_other: (B, S, S, 2), points of the neighbour and of all random partners.
        partners: (R, B) positions in the batch: the random partners.
        keep: (2, 3, B, C, 1, 1) channel dropout: anchor and neighbour; linear branch, nonlinear
            branch and the feature correspondences, which the original draws independently.
        pixels: (B, P, 2) in [0, 1), relative (x, y) of label pixels.
    """

    anchors: np.ndarray
    neighbors: np.ndarray
    coords_anchor: Tensor
    coords_other: Tensor
    partners: Tensor
    keep: Tensor
    pixels: Tensor

    def digest(self) -> str:
        """Return a hash of all draws: equal for equal batches, whatever the number of workers."""
        found = hashlib.blake2b(digest_size=8)
        for part in fields(self):
            found.update(np.ascontiguousarray(np.asarray(getattr(self, part.name))).tobytes())
        return found.hexdigest()


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, stream, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def _anchors(seed: int, step: int, batch: int, num_views: int) -> np.ndarray:
    # Epochs follow each other without a short last batch: each view is seen once per epoch.
    places = np.arange(step * batch, (step + 1) * batch)
    out = np.empty(batch, np.int64)
    for epoch in np.unique(places // num_views):
        here = places // num_views == epoch
        out[here] = _order(seed, int(epoch), num_views)[places[here] % num_views]
    return out


@lru_cache(maxsize=4)  # of millions of views it takes longer than a step
def _order(seed: int, epoch: int, num_views: int) -> np.ndarray:
    generator = _generator(seed, _EPOCH_STREAM, epoch)
    return torch.randperm(num_views, generator=generator).numpy()


def _views(
    job: TrainJob, step: int, neighbors_VN: np.ndarray, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return anchors and neighbours of a step; the first draws of the step's generator."""
    anchors = _anchors(job.seed, step, job.train.batch, len(neighbors_VN))
    ranks = torch.rand(job.train.batch, generator=generator).numpy()
    candidates = neighbors_VN[anchors]
    counts = (candidates != NONE).sum(1)
    picks = candidates[np.arange(job.train.batch), (ranks * counts).astype(np.int64)]
    # Without any neighbour (a single image) the view is its own: the pair teaches nothing new.
    return anchors, np.where(counts > 0, picks, anchors)


@dataclass(frozen=True, slots=True)
class StepReads:
    """What a worker reads in some steps, in order: anchors, then neighbours, of each.

    Nothing is drawn before it is asked for, so any number of steps takes no memory.

    Attributes:
        job: the configuration.
        first: step that the reads begin with.
        end: step before which they end.
        rows: of the batch, this worker's.
        neighbors: (V, N) views, `NONE` where a view has fewer neighbours.
    """

    job: TrainJob
    first: int
    end: int
    rows: slice
    neighbors: np.ndarray

    def __len__(self) -> int:
        """Return the number of reads."""
        return 2 * (self.end - self.first)

    def __getitem__(self, index: int, /) -> np.ndarray:
        """Return the views of a read, (b,)."""
        step, kind = self.first + index // 2, index % 2
        generator = _generator(self.job.seed, _STEP_STREAM, step)
        return _views(self.job, step, self.neighbors, generator)[kind][self.rows]


def draw_step(job: TrainJob, step: int, *, neighbors_VN: np.ndarray, channels: int) -> StepDraws:
    """Make the draws of one step.

    Args:
        job: the configuration; its seed is the only source of randomness.
        step: batches before this one.
        neighbors_VN: (V, N) views, `NONE` where a view has fewer neighbours.
        channels: C of the features.
    """
    batch, samples = job.train.batch, job.loss.samples
    generator = _generator(job.seed, _STEP_STREAM, step)
    anchors, neighbors = _views(job, step, neighbors_VN, generator)
    points = torch.rand(2, batch, samples, samples, 2, generator=generator) * 2 - 1
    draw_partners = overlapping_permutation if job.compat.overlapping_partners else derangement
    partners = [draw_partners(batch, generator) for _ in range(job.loss.negatives)]
    keep = dropout_masks(6 * batch, channels, job.head.dropout, generator)
    return StepDraws(
        anchors=anchors,
        neighbors=neighbors,
        coords_anchor=points[0],
        coords_other=points[1],
        partners=torch.stack(partners),
        keep=keep.view(2, 3, batch, channels, 1, 1),
        pixels=torch.rand(batch, job.train.linear_pixels, 2, generator=generator),
    )

"""What the optional losses and studies need of a step: their draws, and their share of a batch.

Nothing here happens unless a setting asks for it, and nothing here changes the draws of
`sampler.draw_step`: these come from a stream of their own, from seed and step alone.

Legend: b views of this worker, B of the whole batch, C feature channels, S x S sampled points,
P pixels, H W pixels of a view, h w grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stego_core.config.method import LossConfig
from stego_core.config.schema import TrainJob
from stego_core.errors import InputError
from stego_core.images.augment import Augmentation, augment, draw_augmentation, source_coords
from stego_core.loss.crf import POINTS, SIDE
from stego_core.model.head import dropout_masks
from stego_core.training.views import FromBackbone, LabelSource

_STREAM = 5


@dataclass(frozen=True, slots=True)
class OptionalDraws:
    """The draws of one step, for the whole batch; None for what no setting asks for.

    Attributes:
        salience: (2, 2, B, S, S) in [0, 1): of anchor and neighbour, which points move and where.
        augmentations: of each anchor.
        keep: (2, B, C, 1, 1) channel dropout of the augmented views: linear and nonlinear branch.
        crf_pixels: (P, 2) row and column, shared by all views.
    """

    salience: Tensor | None = None
    augmentations: tuple[Augmentation, ...] | None = None
    keep: Tensor | None = None
    crf_pixels: Tensor | None = None


@dataclass(frozen=True, slots=True)
class OptionalInputs:
    """This worker's share of what the settings ask for; None for the rest.

    Attributes:
        labels: (b, H, W) int64 label maps of anchors and of neighbours.
        salience: (2, 2, b, S, S), see `OptionalDraws`.
        images: (b, 3, H, W) anchors as the backbone sees them.
        crf_pixels: see `OptionalDraws`.
        augmented: (b, C, h, w) features of the augmented anchors.
        coords: (b, h, w, 2) where in the anchor each of their cells comes from.
        keep: (2, b, C, 1, 1), see `OptionalDraws`.
    """

    labels: tuple[Tensor, Tensor] | None = None
    salience: Tensor | None = None
    images: Tensor | None = None
    crf_pixels: Tensor | None = None
    augmented: Tensor | None = None
    coords: Tensor | None = None
    keep: Tensor | None = None


def needs_pixels(config: LossConfig) -> bool:
    """Tell whether a step needs the images, and so the backbone, whatever is stored."""
    return config.alignment > 0 or config.crf > 0


def needs_labels(config: LossConfig) -> bool:
    """Tell whether a step needs whole label maps."""
    return config.salience or config.oracle


def check_sources(config: LossConfig, *, has_labels: bool) -> None:
    """Check that the data have what the settings need.

    Raises:
        InputError: if labels are needed and there are none.
    """
    if needs_labels(config) and not has_labels:
        name = "loss.oracle" if config.oracle else "loss.salience"
        raise InputError(f"{name} needs labels: give a data set with labels, or switch it off")


def draw_optional(job: TrainJob, step: int, *, channels: int, side: int) -> OptionalDraws:
    """Make the optional draws of one step.

    Args:
        job: the configuration; its seed is the only source of randomness.
        step: batches before this one.
        channels: C of the features that the head sees.
        side: of a view, pixels.
    """
    # One stream for each kind, so that switching one on doesn't change another.
    salience, alignment, crf = (
        np.random.default_rng([job.seed, _STREAM, step, kind]) for kind in range(3)
    )
    batch, samples = job.train.batch, job.loss.samples
    augmentations, keep = None, None
    if job.loss.alignment:
        augmentations = tuple(draw_augmentation(alignment, side) for _ in range(batch))
        generator = torch.Generator().manual_seed(int(alignment.integers(2**63)))
        keep = dropout_masks(2 * batch, channels, job.head.dropout, generator)
        keep = keep.view(2, batch, channels, 1, 1)
    shape = (2, 2, batch, samples, samples)
    return OptionalDraws(
        salience=torch.from_numpy(salience.random(shape)) if job.loss.salience else None,
        augmentations=augmentations,
        keep=keep,
        crf_pixels=torch.from_numpy(crf.integers(SIDE, size=(POINTS, 2))) if job.loss.crf else None,
    )


def read_optional(
    draws: OptionalDraws,
    rows: slice,
    views: tuple[np.ndarray, np.ndarray],
    *,
    pixels: FromBackbone | None,
    labels: LabelSource | None,
    side: int,
    device: str,
) -> OptionalInputs:
    """Read what the draws ask for.

    Args:
        draws: of the whole batch.
        rows: this worker's rows of the draws.
        views: (b,) anchors and (b,) neighbours of this worker.
        pixels: of the views, if `needs_pixels`; else None.
        labels: of the views, if `needs_labels`; else None.
        side: of a view, pixels.
        device: where the tensors go.
    """
    maps = None if labels is None else tuple(labels.read_maps(one, side) for one in views)
    images = augmented = coords = None
    if pixels is not None:
        shown = pixels.pixels(views[0])
        if draws.crf_pixels is not None:
            images = pixels.images(shown)
        if draws.augmentations is not None:
            changes = draws.augmentations[rows]
            copies = [augment(view, change) for view, change in zip(shown, changes, strict=True)]
            augmented = pixels.embed(np.stack(copies))
            h, w = augmented.shape[2:]
            places = np.stack([source_coords(change, side, h, w) for change in changes])
            coords = torch.from_numpy(places).float()

    def here(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device)

    return OptionalInputs(
        labels=None if maps is None else (maps[0].to(device), maps[1].to(device)),
        salience=here(None if draws.salience is None else draws.salience[:, :, rows]),
        images=here(images),
        crf_pixels=here(draws.crf_pixels),
        augmented=here(augmented),
        coords=here(coords),
        keep=here(None if draws.keep is None else draws.keep[:, rows]),
    )

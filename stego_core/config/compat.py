"""Switches that bring back what the original code does where this project departs from it.

Every switch is off by default and changes one thing. A job has only the switches that act on it;
the presets `stego-paper.toml` and `stego-paper-evaluate.toml` turn all of them on. docs/compat.md
lists them with the reasons for departing. What is an ordinary setting has no switch: the presets
set `neighbors.exclude_own`, `head.whiten` and others as the original has them.

Source: the code published with Hamilton et al. 2022, as docs/compat.md describes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from stego_core.config.base import Strict


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageCompat(Strict):
    """What the original does to every image."""

    nearest_images: bool = False
    """Resize images by taking the nearest pixel, without antialiasing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MineCompat(ImageCompat):
    """What the original does while it mines neighbours."""

    jpeg_crops: bool = False
    """Compress crops (`views.crops` other than `whole`) as JPEG of quality 75 before they are
    resized, as the original does when it stores them."""
    mining_dropout: bool = False
    """Drop one channel in ten of each view's features, at random, before they are averaged into
    the embedding: the original leaves its network in training mode."""
    skip_first_neighbor: bool = False
    """Leave out the first hit, assumed to be the view itself, instead of the view by its id: with
    exact duplicates a view may become its own neighbour."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainCompat(MineCompat):
    """What the original does while it mines and trains."""

    overlapping_partners: bool = False
    """Repair the fixed points of a random permutation instead of drawing a derangement: some
    views become partners twice, others never."""
    worker_mean: bool = False
    """Centre correspondences by the mean of each worker's own rows, not of the whole batch."""
    transposed_alignment: bool = False
    """Read the alignment loss's coordinates as (row, column) where sampling expects (x, y): a
    horizontal flip is then undone as a vertical one. Acts where `loss.alignment` is not 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateCompat(ImageCompat):
    """What the original does while it scores."""

    centre_crop: bool = False
    """Score the centre square of each image at predict.resolution, images and labels resized to
    it, instead of whole images at label size."""
    dropped_extra_clusters: bool = False
    """Leave pixels out that lie in clusters numbered beyond the classes, and count clusters
    without a class, where they have pixels, as one more class of IoU 0."""

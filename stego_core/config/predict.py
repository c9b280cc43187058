"""How an image becomes a label map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stego_core.config.base import Positive, PositiveFloat, Strict


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig(Strict):
    """How an image becomes a label map."""

    resolution: Positive = 320
    """Square root of the pixels the backbone sees; the aspect ratio is kept, nothing is cut off."""
    batch: Positive = 8
    """Images of one shape that share one pass."""
    alpha: PositiveFloat = 2.0
    """Sharpness of cluster probabilities, softmax(alpha * cosine) (the method's value)."""
    shard_batches: Positive = 32
    """Work units that are merged into one Parquet file."""
    unit_images: Positive = 32
    """Images of one work unit: what is lost when a process dies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelMapConfig(PredictConfig):
    """How an image becomes a label map, with what costs extra."""

    tile: Positive = 1024
    """Longest side of what the backbone sees at a time, in pixels; larger images are cut into
    overlapping tiles and their codes blended."""
    scales: tuple[PositiveFloat, ...] = (1.0,)
    """Sizes at which an image is seen, as factors of `resolution`; codes are averaged. Every size
    costs a pass; those above 1 see no more detail."""
    crf: Literal["fast", "dense"] = "fast"
    """What `--crf` runs. `fast`: mean-field inference in torch, needs no extra; `dense`:
    pydensecrf, which the paper used (needs the extra `crf`)."""
    crf_device: Literal["cpu", "model"] = "cpu"
    """Where `crf = "fast"` computes. `cpu`: image by image; segmentations do it in the tasks that
    write masks, beside the model. `model`: a batch at a time on the model's device, which spares
    CPUs where that is a GPU; single pixels may differ between devices."""

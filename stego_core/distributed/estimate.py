"""What a run will take, for the plan of a dry run: space of the feature store, and time.

Times are of what is measured here and now on the CPU of this machine: a few views through the
backbone, a few steps on noise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from stego_core.config.schema import (
    BackboneConfig,
    EvaluateJob,
    MineJob,
    SegmentJob,
    TrainJob,
    TuneJob,
)
from stego_core.images.views import view_count
from stego_core.model.registry import BackboneRecord, find_backbone
from stego_core.model.speed import seconds_per_view
from stego_core.storage import fs
from stego_core.training.speed import seconds_per_step, views_read
from stego_core.training.views import view_side


def store_bytes(job: MineJob, record: BackboneRecord, num_images: int) -> int:
    """Return the size of the patch features of all views, in bytes."""
    tokens = (view_side(job.views, record.patch_size) // record.patch_size) ** 2
    return num_images * views_per_image(job) * tokens * feature_width(job, record) * 2


def feature_width(job: MineJob, record: BackboneRecord) -> int:
    """Return C of the features."""
    return _width(record, job.backbone.feature, job.backbone.blocks)


def _width(record: BackboneRecord, feature: str, blocks: Sequence[int]) -> int:
    return record.width * (len(blocks) if feature == "blocks" else 1)


def evaluated_bytes(job: EvaluateJob, backbone: dict[str, Any], num_images: int) -> int:
    """Return about the size of the features that evaluating a split looks at, in bytes.

    Args:
        job: the evaluation.
        backbone: its settings, as the card of `job.model` has them.
        num_images: of the split.
    """
    record = find_backbone(backbone["name"])
    tokens = (job.predict.resolution / record.patch_size) ** 2
    passes = sum(scale**2 for scale in job.predict.scales) * (2 if job.flip else 1)
    width = _width(record, backbone["feature"], backbone["blocks"])
    return round(num_images * passes * tokens * width * 4)


def views_per_image(job: MineJob) -> int:
    """Return how many views each image gives."""
    return view_count(job.views)


def fate(job: MineJob | EvaluateJob, size: int) -> str:
    """Return the size of the features, and what becomes of them."""
    budget = f"store.max_bytes is {_mebibytes(job.store.max_bytes)}"
    if size <= job.store.max_bytes:
        return f"{_mebibytes(size)}, stored ({budget})"
    return f"{_mebibytes(size)}, not stored ({budget})"


def lacking_room(folder: str, size: int) -> str | None:
    """Return what to do where a disk has no room for so many bytes of features; None where it has.

    What is in the folder already counts as room: it is either used or deleted first.
    """
    free = fs.free_bytes(folder)
    if free is None or size <= free:
        return None
    held = sum(file.num_bytes for file in fs.list_files(folder)) if fs.is_folder(folder) else 0
    if size <= free + held:
        return None
    return (
        f"features take {_mebibytes(size - held)} and the disk of {folder} has {_mebibytes(free)} "
        "free: make room, or train without storing them (--store.max-bytes 0)"
    )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def mining_time(job: MineJob, record: BackboneRecord, num_views: int) -> str:
    """Return about how long mining takes, to follow what it does; empty where nobody knows."""
    view_s = seconds_per_view(job.backbone, view_side(job.views, record.patch_size))
    if view_s is None:
        return ""
    return f", about {_minutes(num_views * view_s)} on the CPU of this machine"


def training_time(
    job: MineJob, record: BackboneRecord, num_views: int, *, is_stored: bool
) -> list[str]:
    """Return a line on how long the steps take with and without a store, if anybody knows."""
    if not isinstance(job, TrainJob) or isinstance(job, TuneJob):
        return []
    side = view_side(job.views, record.patch_size)
    grid = side // record.patch_size
    step_s = seconds_per_step(job, width=feature_width(job, record), grid=grid)
    view_s = seconds_per_view(job.backbone, side)
    if step_s is None or view_s is None:
        return []
    # A worker has one thread, and takes its part of each batch.
    steps_s = job.train.steps * step_s / min(job.workers, job.train.batch, os.cpu_count() or 1)
    streamed_s = steps_s + views_read(job, num_views) * view_s
    stored = f"about {_minutes(steps_s)} from the store"
    streamed = f"about {_minutes(streamed_s)} streamed through the backbone"
    first, second = (stored, streamed) if is_stored else (streamed, stored)
    return [f"time of the steps: {first} ({second}), on the CPU of this machine"]


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))} min"


def predicting_time(
    job: SegmentJob | EvaluateJob, backbone: dict[str, Any], num_images: int
) -> list[str]:
    """Return a line on how long the backbone takes for so many images, if anybody knows.

    Args:
        job: the settings.
        backbone: settings of the model's.
        num_images: to predict.
    """
    config = BackboneConfig(name=backbone["name"], precision=job.precision)
    patch = find_backbone(config.name).patch_size
    view_s = seconds_per_view(config, -(-job.predict.resolution // patch) * patch)
    if view_s is None:
        return []
    passes = (2 if job.flip else 1) * sum(scale**2 for scale in job.predict.scales)
    minutes = max(1, round(num_images * passes * view_s / 60))
    crf = "; the CRF comes on top" if job.crf else ""
    return [f"time of the backbone: about {minutes} min on the CPU of this machine{crf}"]

"""What the benchmarks of bulk segmentation share: inputs, the bare backbone, the job.

Not a benchmark itself.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.common import seconds
from stego_core.config.schema import ImageLimits, PredictConfig, SegmentJob
from stego_core.distributed import segment
from stego_core.distributed.cluster import ActorPlan
from stego_core.distributed.fetch import WholeImage
from stego_core.images.decode import ImageFailure, decode_image
from stego_core.model.segmenter import Segmenter
from stego_core.storage import fs
from stego_core.storage.manifest import list_images
from stego_core.storage.run import RunDirectory

CORES = os.cpu_count() or 1


def gather(images: str, count: int, folder: str) -> str:
    """Copy `count` images into a new folder, the same ones again where there are fewer."""
    files = list_images(images)
    target = Path(folder, f"images-{count}")
    target.mkdir(parents=True)
    for index in range(count):
        path = Path(fs.local_path(files[index % len(files)].uri))
        shutil.copyfile(path, target / f"{index:06d}{path.suffix}")
    return str(target)


def prepared_batches(images: str, segmenter: Segmenter, batch: int) -> list[torch.Tensor]:
    """Return the decoded, resized images in batches of one shape."""
    config = PredictConfig()
    prepare = WholeImage(resolution=config.resolution, patch=segmenter.backbone.patch_size)
    shapes: dict[tuple[int, ...], list[np.ndarray]] = {}
    for file in list_images(images):
        image = decode_image(fs.read_bytes(file.uri), ImageLimits())
        if not isinstance(image, ImageFailure):
            pixels = prepare(image)
            shapes.setdefault(pixels.shape, []).append(pixels)
    return [
        torch.from_numpy(np.stack(group[start : start + batch]))
        for group in shapes.values()
        for start in range(0, len(group), batch)
    ]


def backbone_rate(segmenter: Segmenter, batches: list[torch.Tensor], threads: int) -> float:
    """Return images per second of the backbone alone, a batch per thread."""
    torch.set_num_threads(1)

    def compute(batch: torch.Tensor) -> None:
        with torch.inference_mode():
            segmenter.backbone(segmenter.backbone.prepare(batch))

    with ThreadPoolExecutor(threads) as pool:
        took_s = seconds(lambda: list(pool.map(compute, batches)))
    return sum(len(batch) for batch in batches) / took_s


def run_segment(job: SegmentJob, actors: ActorPlan | None = None) -> dict[str, Any]:
    """Segment in this process's Ray; return the `segment/done` event.

    Args:
        job: the settings; its output must be new.
        actors: in place of the job's own plan.
    """
    with _planned(actors):
        segment.segment_bucket(job, RunDirectory(job.out, job="segment_bucket"))
    return done_event(job.out)


@contextmanager
def _planned(actors: ActorPlan | None) -> Iterator[None]:
    if actors is None:
        yield
        return
    with mock.patch.object(segment, "plan_actors", return_value=actors):
        yield


def done_event(out: str) -> dict[str, Any]:
    """Return the `segment/done` event of a run directory."""
    events = [json.loads(line) for line in Path(out, "events.jsonl").read_text().splitlines()]
    (done,) = [event for event in events if event["event"] == "segment/done"]
    return dict(done)


def segment_job(images: str, model: str, out: str, **changes: Any) -> SegmentJob:
    """Return a job with absolute paths and defaults otherwise."""
    paths = {"input": images, "model": str(Path(model).absolute()), "out": out}
    return replace(SegmentJob(), **paths, **changes)

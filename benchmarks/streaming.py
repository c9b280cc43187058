"""A training without a feature store: the backbone as Ray Data actors, and inside the worker.

Both run the steps of `training.loop.train` on the same views in the same order, from decoding to
the optimisers. Streamed, the actors of a one-worker plan read ahead while this process computes
the steps; the actors' start is not counted, since it is paid once. Inside the worker each step
waits for its features, with torch's threads on all cores. Needs the run directory of a training
(`--model`) with its feature store, and its images.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.common import Options, Row, run
from benchmarks.training_step import mined, train_data
from stego_core.config.schema import TrainJob
from stego_core.distributed.cluster import connect
from stego_core.distributed.stream import StreamedFeatures, StreamSettings
from stego_core.distributed.stream_plan import StreamPlan, plan_stream
from stego_core.distributed.stream_reads import ViewImages
from stego_core.images.views import ViewCutter
from stego_core.model.backbone import load_backbone
from stego_core.model.registry import find_backbone
from stego_core.storage.feature_store import StoredFeatures, Views
from stego_core.training.loop import LocalContext, TrainData, train
from stego_core.training.sampler import draw_step
from stego_core.training.views import FromBackbone, FromStore, view_side

_LOCAL_STEPS, _STREAMED_STEPS = 3, 12
_REPEATS = 2  # at most: each takes a minute
_FIRST_STEPS = 4  # of the stream: what was computed ahead is used up


class _Clock(LocalContext):
    """Notes when steps end."""

    def __init__(self) -> None:
        super().__init__()
        self.ends_s: list[float] = []

    def event(self, name: str, **values: object) -> None:
        """Note the time."""
        self.ends_s.append(time.perf_counter())


def images_per_s(job: TrainJob, data: TrainData, steps: int, first: int) -> float:
    """Return the images that are trained on in a second, without the first steps."""
    settings: dict[str, Any] = {"steps": first + steps, "log_every": 1, "checkpoint_every": 10**9}
    clock = _Clock()
    train(replace(job, train=replace(job.train, **settings)), data, clock, device="cpu")
    took_s = clock.ends_s[-1] - clock.ends_s[first - 1]
    return 2 * job.train.batch * steps / took_s


def _settings(
    job: TrainJob, views: Views, uris: dict[int, str], stored: StoredFeatures
) -> StreamSettings:
    side = view_side(job.views, find_backbone(job.backbone.name).patch_size)
    return StreamSettings(
        backbone=job.backbone,
        cutter=ViewCutter(side, job.views, job.limits, job.compat),
        images=ViewImages(views.image_ids, views.crops, uris),
        shape=(stored.shape[0], stored.shape[1], stored.shape[2]),
    )


def _same(streamed: StreamedFeatures, stored: FromStore, job: TrainJob, data: TrainData) -> float:
    """Return the share of values of a step's anchors that are those of the store, bit for bit."""
    anchors = draw_step(job, 0, neighbors_VN=data.neighbors, channels=data.channels).anchors
    found = streamed.read(anchors).numpy() == stored.read(anchors).numpy()
    return float(np.mean(found))


def measure(options: Options) -> list[Row]:
    """Return the row."""
    torch.set_num_threads(os.cpu_count() or 1)
    job, manifest, views, store = mined(options.model)
    store_files = StoredFeatures(store, manifest.num_units)
    stored = FromStore(store_files)
    rows = manifest.read(["image_id", "image_uri"])
    uris = dict(zip(rows["image_id"].to_pylist(), rows["image_uri"].to_pylist(), strict=True))
    backbone = load_backbone(job.backbone)
    local = FromBackbone(
        backbone, views, uris, config=job.views, limits=job.limits, compat=job.compat
    )
    base = train_data(options.model, stored, stored, views, job)
    local_rates, streamed_rates, shares = [], [], []
    with connect():
        plan: StreamPlan = plan_stream(1)
        settings = _settings(job, views, uris, store_files)
        for _ in range(min(options.repeats, _REPEATS)):
            local_rates.append(images_per_s(job, replace(base, features=local), _LOCAL_STEPS, 1))
            with StreamedFeatures(settings, plan, steps=32) as streamed:
                shares.append(_same(streamed, stored, job, base))
                data = replace(base, features=streamed)
                streamed_rates.append(images_per_s(job, data, _STREAMED_STEPS, _FIRST_STEPS))
    pairs = list(zip(local_rates, streamed_rates, strict=True))
    return [
        Row(
            what="training without a store, streamed",
            against="the same with the backbone inside the worker",
            bar=1,
            values=[streamed / local for local, streamed in pairs],
            facts={
                "worker_images_per_s": [round(rate, 2) for rate in local_rates],
                "streamed_images_per_s": [round(rate, 2) for rate in streamed_rates],
                "values_equal_to_the_store": shares,
                "batch": job.train.batch,
                "resolution": job.views.resolution,
                "precision": backbone.precision,
            },
        )
    ]


if __name__ == "__main__":
    run("streaming", __doc__, measure)

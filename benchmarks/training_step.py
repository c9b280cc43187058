"""One training step from stored features, beside the same step with the backbone in the loop.

Both run the whole step of `training.loop.train`: draws, features of anchors and neighbours, loss,
backward and optimisers, batch 16, on the same views in the same order. With the store, whose
whitened views are kept after the first few steps, it runs on one thread, as a training worker of
the job does (docs/adr/0034-one-thread.md). Without a store the features come from decoding, cutting
and the frozen backbone (bf16 where there is bf16), and the baseline keeps all cores.
Needs the run directory of a training (`--model`) with its feature store, and its images.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Options, Row, run, seconds
from stego_core.config.load import load_job
from stego_core.config.schema import TrainJob
from stego_core.model.backbone import load_backbone
from stego_core.model.registry import find_backbone
from stego_core.model.whitening import fit_whitening
from stego_core.neighbors.table import neighbor_indices, read_table
from stego_core.storage.feature_store import StoredFeatures, Views, read_views
from stego_core.storage.manifest import Manifest, read_manifest
from stego_core.training.loop import LocalContext, TrainData, train
from stego_core.training.maps import sample_tokens
from stego_core.training.views import FeatureSource, FromBackbone, FromStore, view_side

_STORED_STEPS, _BACKBONE_STEPS = 40, 2


def mined(model: str) -> tuple[TrainJob, Manifest, Views, str]:
    """Return a run's settings, the manifest and views of its feature store, and its folder."""
    record = json.loads(Path(model, "train.json").read_text())
    flags = ["--config", str(Path(model, "config.resolved.toml"))]
    # A number of clusters that was chosen stands in no configuration.
    job = load_job(TrainJob, [*flags, "--clusters.count", str(record["clusters"])], prog="bench")
    key = json.loads(Path(model, "mine.json").read_text())["features"]
    store = str(Path(model, "features", key))
    manifest = read_manifest(f"{store}/manifest.parquet")
    return job, manifest, read_views(store, manifest.num_units), store


def train_data(
    model: str, features: FeatureSource, stored: FeatureSource, views: Views, job: TrainJob
) -> TrainData:
    """Return what a step sees; `features` is what differs between the two sides."""
    # The table is of the views that were usable: its key is not always that of the store.
    key = json.loads(Path(model, "mine.json").read_text())["key"]
    neighbors = neighbor_indices(
        read_table(str(Path(model, "neighbors")), key=key), views, job.neighbors.used
    )
    whitening = None
    if job.head.whiten:
        tokens = sample_tokens(stored, len(neighbors), 4000, seed=0)
        whitening = fit_whitening(tokens, job.head.whiten)
    channels = whitening.width if whitening else stored.read(neighbors[:1, 0] * 0).shape[1]
    return TrainData(
        features=features,
        neighbors=neighbors,
        channels=channels,
        labels=None,
        num_classes=0,
        side=view_side(job.views, find_backbone(job.backbone.name).patch_size),
        shifts={"self": 0.3, "knn": 0.3, "random": 0.3},
        whitening=whitening,
        class_tokens=views.class_tokens,
    )


def step_seconds(job: TrainJob, data: TrainData, steps: int, *, threads: int) -> float:
    """Return the seconds of one step on so many threads, without the start of the training."""
    torch.set_num_threads(threads)

    def trained(count: int) -> float:
        settings = {"steps": count, "log_every": 10**9, "checkpoint_every": 10**9}
        short = _changed(job, settings)
        return seconds(lambda: train(short, data, LocalContext(), device="cpu"))

    start_s = trained(1)
    return (trained(1 + steps) - start_s) / steps


def _changed(job: TrainJob, settings: dict[str, Any]) -> TrainJob:
    from dataclasses import replace

    return replace(job, train=replace(job.train, **settings))


def measure(options: Options) -> list[Row]:
    """Return the row."""
    cores = os.cpu_count() or 1
    job, manifest, views, store = mined(options.model)
    stored = FromStore(StoredFeatures(store, manifest.num_units))
    rows = manifest.read(["image_id", "image_uri"])
    uris = dict(zip(rows["image_id"].to_pylist(), rows["image_uri"].to_pylist(), strict=True))
    backbone = load_backbone(job.backbone)
    loop = FromBackbone(
        backbone, views, uris, config=job.views, limits=job.limits, compat=job.compat
    )
    sides = [train_data(options.model, source, stored, views, job) for source in (stored, loop)]
    step_seconds(job, sides[0], 5, threads=1)  # warm
    pairs = [
        (
            step_seconds(job, sides[0], _STORED_STEPS, threads=1),
            step_seconds(job, sides[1], _BACKBONE_STEPS, threads=cores),
        )
        for _ in range(options.repeats)
    ]
    return [
        Row(
            what="training step with the feature store",
            against="the same step with the backbone in the loop",
            bar=20,
            values=[slow / fast for fast, slow in pairs],
            facts={
                "stored_step_s": [round(fast, 4) for fast, _ in pairs],
                "backbone_step_s": [round(slow, 4) for _, slow in pairs],
                "threads": {"stored": 1, "backbone": cores},
                "batch": job.train.batch,
                "resolution": job.views.resolution,
                "precision": backbone.precision,
            },
        )
    ]


if __name__ == "__main__":
    run("training_step", __doc__, measure)

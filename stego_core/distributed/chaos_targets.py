"""What a soak disturbs: a job of its own to start, and how what it left is compared."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from stego_core.config.load import load_job
from stego_core.config.method import ClustersConfig, HeadConfig, TrainConfig
from stego_core.config.schema import (
    BackboneConfig,
    ChaosJob,
    DataConfig,
    SegmentJob,
    TrainJob,
    ViewConfig,
)
from stego_core.masks.verify import row_digests, verify_output
from stego_core.model.backbone import load_backbone
from stego_core.model.head import Head
from stego_core.model.registry import find_backbone
from stego_core.model.segmenter import model_card, save_segmenter
from stego_core.model.weights import resolve_weights
from stego_core.storage import fs
from stego_core.storage.run import RunDirectory

_CLUSTERS = 5
_COMPARED = ("model", "neighbors", "features")  # folders of a training
_TINY = BackboneConfig(name="test_vit", weights="random", precision="fp32")


@dataclass(frozen=True, slots=True)
class Found:
    """What a job left.

    Attributes:
        digests: of each result, by its id or name.
        duplicated: results that are there more than once.
        notes: what else is worth a sum in the summary.
    """

    digests: Mapping[Any, bytes]
    duplicated: int = 0
    notes: Counter[str] = field(default_factory=Counter)


class Target(Protocol):
    """A job that can be started again and again."""

    @property
    def script(self) -> str:
        """Return the name of its file below jobs/."""

    @property
    def unit(self) -> str:
        """Return what its results are: rows or files."""

    def into(self, out: str) -> SegmentJob | TrainJob:
        """Return the job that writes to this output."""

    def found(self, out: str) -> Found:
        """Return what is in an output."""


class Segmentation:
    """Segmentation: its results are the rows of the masks."""

    script = "segment_bucket.py"
    unit = "rows"

    def __init__(self, job: ChaosJob, run: RunDirectory) -> None:
        model = job.model
        if model is None:
            model = run.path("random-model")
            _random_model(model)
        self._job = SegmentJob(
            input=_pictures(job, run),
            model=model,
            actors=job.actors,
            predict=job.predict,
            precision="fp32",
            limits=job.limits,
        )

    def into(self, out: str) -> SegmentJob:
        """Return the job that writes to this output."""
        return replace(self._job, out=out)

    def found(self, out: str) -> Found:
        """Return the digest of each row."""
        return Found(row_digests(out), verify_output(out).duplicated)


class Training:
    """Mining and training: its results are the files of features, neighbours and model."""

    script = "train.py"
    unit = "files"

    def __init__(self, job: ChaosJob, run: RunDirectory) -> None:
        if job.settings is not None:
            train = load_job(TrainJob, ["--config", job.settings], prog="chaos.py")
            data = train.data if job.input is None else replace(train.data, root=job.input)
            self._job = replace(train, data=data)
            return
        self._job = TrainJob(
            data=DataConfig(root=_pictures(job, run)),
            backbone=_TINY,
            views=ViewConfig(resolution=64),
            head=HeadConfig(whiten=4),
            train=TrainConfig(steps=job.steps, batch=8, checkpoint_every=20, log_every=20),
            clusters=ClustersConfig(count=3, sample=2000),
            workers=job.actors,
            limits=job.limits,
            seed=job.seed,
        )

    def into(self, out: str) -> TrainJob:
        """Return the job that writes to this output."""
        return replace(self._job, out=out)

    def found(self, out: str) -> Found:
        """Return the digest of each file, and how often training went on from a checkpoint."""
        digests: dict[str, bytes] = {}
        for folder in _COMPARED:
            for file in fs.list_files(fs.join(out, folder)):
                digests[f"{folder}/{file.path}"] = hashlib.sha256(fs.read_bytes(file.uri)).digest()
        return Found(digests, notes=Counter(resumed=_resumed(out)))


def _resumed(out: str) -> int:
    count = 0
    for name in ("events.jsonl", "events-train.jsonl"):
        for line in (fs.read_if_exists(fs.join(out, name)) or b"").splitlines():
            try:
                count += json.loads(line)["event"] == "train/resumed"
            except ValueError:
                continue  # a line that a killed process left unfinished
    return count


def make_target(job: ChaosJob, run: RunDirectory) -> Target:
    """Return what is disturbed, with pictures and a model of random weights where none are."""
    return Training(job, run) if job.target == "train" else Segmentation(job, run)


def _pictures(job: ChaosJob, run: RunDirectory) -> str:
    if job.input is not None:
        return job.input
    folder = run.path("pictures")
    _draw(folder, job.images, job.seed)
    return folder


def _draw(folder: str, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for number in range(count):
        height, width = generator.choice([64, 80, 96], 2)
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        fs.write_bytes(fs.join(folder, f"picture-{number:05d}.png"), buffer.getvalue())


def _random_model(folder: str) -> None:
    head_config = HeadConfig(kind="linear", dim=16, dropout=0, whiten=0, smooth=0)
    backbone = load_backbone(_TINY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Head(backbone.width, head_config)
        clusters = torch.randn(_CLUSTERS, head.dim)
    tensors = {f"head.{key}": value for key, value in head.state_dict().items()}
    card = model_card(
        weights=resolve_weights(find_backbone(_TINY.name), _TINY.weights),
        config=_TINY,
        head=head_config,
        cluster_names=[f"cluster {number}" for number in range(_CLUSTERS)],
        num_classes=0,
        class_names=[],
    )
    save_segmenter(folder, {**tensors, "clusters": clusters}, card)

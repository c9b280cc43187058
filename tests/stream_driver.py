"""A driver for tests/ray/test_stream.py: streamed features and trainings beside stored ones.

    python tests/stream_driver.py RUN FOLDER

RUN is a training with a feature store. The last line that is printed is JSON: what was found.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import ray
import torch
from factories import FolderContext, Killed

from stego_core.config.load import load_job
from stego_core.config.schema import TrainJob
from stego_core.datasets.directory import open_dataset
from stego_core.distributed.cluster import connect
from stego_core.distributed.mine import Mined
from stego_core.distributed.stream import StreamedFeatures
from stego_core.distributed.stream_plan import plan_stream
from stego_core.distributed.training_data import local_features, stream_settings, training_data
from stego_core.images.views import ViewCutter
from stego_core.model.registry import find_backbone
from stego_core.model.weights import resolve_weights
from stego_core.storage.feature_store import read_views
from stego_core.storage.manifest import read_manifest
from stego_core.training.fit import fit
from stego_core.training.loop import LocalContext, TrainData, train
from stego_core.training.step import Trainable


@dataclass(frozen=True, slots=True)
class Faulty(ViewCutter):
    """Ends its process the first time, and fails the second time."""

    notes: str

    def cut(self, uri: str, image_id: int, crops: Sequence[int]) -> list[np.ndarray]:
        died, failed = Path(self.notes, "died"), Path(self.notes, "failed")
        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if not failed.exists():
            failed.touch()
            raise RuntimeError("something that is none of ours")
        return ViewCutter.cut(self, uri, image_id, crops)


class Noted:
    """Reads that leave a file for each that anybody looks at."""

    def __init__(self, reads: list[np.ndarray], folder: Path) -> None:
        self._reads, self._folder = reads, folder
        folder.mkdir(parents=True)

    def __len__(self) -> int:
        return len(self._reads)

    def __getitem__(self, index: int, /) -> np.ndarray:
        (self._folder / str(index)).touch()
        return self._reads[index]


def mined_of(job: TrainJob) -> Mined:
    key = json.loads(Path(job.out, "mine.json").read_text())["features"]
    store = f"{job.out}/features/{key}"
    weights = resolve_weights(find_backbone(job.backbone.name), job.backbone.weights)
    dataset = open_dataset(job.data.root, job.data.split)
    manifest = read_manifest(f"{store}/manifest.parquet")
    return Mined(dataset, manifest, store, True, key, weights, job.backbone)


def compare_reads(streamed: StreamedFeatures, stored, ahead: int, folder: Path) -> dict:
    generator = np.random.default_rng(0)
    reads = [generator.choice(40, size) for size in [8, 20, 3] * 20]
    noted = Noted(reads, folder / "noted")
    streamed.expect(noted)
    equal = [torch.equal(streamed.read(views), stored.read(views)) for views in reads[:3]]
    time.sleep(3)  # long enough for anything that would run on
    seen = [int(path.name) for path in (folder / "noted").iterdir()]
    views = sum(len(np.unique(reads[number])) for number in seen if number > 2)
    equal += [torch.equal(streamed.read(views), stored.read(views)) for views in reads[3:]]
    other = np.array([39, 0, 7, 39])  # what was not announced is computed too
    found, expected = streamed.read(other), stored.read(other)
    equal.append(torch.equal(found, expected))
    layout = found.stride() == expected.stride()
    # The next read of `reads` may have been looked at and not released.
    return {"equal": equal, "ahead": views, "bound": ahead + 20, "layout": layout}


def trained(job: TrainJob, data: TrainData, context) -> dict[str, torch.Tensor]:
    model: Trainable = train(job, data, context, device="cpu")
    return model.state_dict() | fit(job, model, data)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def is_free_within(seconds):
    """Wait until nothing holds a CPU: actors end when nobody refers to them any more."""
    for _ in range(2 * seconds):
        gc.collect()
        if ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]:
            return True
        time.sleep(0.5)
    return False


def main(run: str, folder: Path) -> None:
    torch.set_num_threads(1)
    config = ["--config", str(Path(run, "config.resolved.toml")), "--train.steps", "12"]
    often = ["--train.log-every", "1", "--train.checkpoint-every", "5"]
    job = load_job(TrainJob, [*config, *often], prog="test")
    mined = mined_of(job)
    views = read_views(mined.store_uri, mined.manifest.num_units)
    stored = local_features(job, mined, views, device="cpu")
    with connect():
        plan = plan_stream(1)
        settings = stream_settings(job, mined, views)
        parts = {name: getattr(settings.cutter, name) for name in ViewCutter.__slots__}
        settings = replace(settings, cutter=Faulty(**parts, notes=str(folder)))
        found = {}
        with StreamedFeatures(settings, plan, steps=job.train.steps) as streamed:
            found["reads"] = compare_reads(streamed, stored, plan.views_ahead, folder)
            both = [
                training_data(job, mined, views, LocalContext(), features=source, device="cpu")
                for source in (stored, streamed)
            ]
            expected = trained(job, both[0], LocalContext())
            found["whole"] = same(trained(job, both[1], LocalContext()), expected)
            try:
                trained(job, both[1], FolderContext(folder / "killed", dies_at=8))
                raise AssertionError("it was not killed")
            except Killed:
                pass
            context = FolderContext(folder / "killed")
            found["resumed"] = same(trained(job, both[1], context), expected)
            try:
                streamed.expect([np.array([1, 2])])
                streamed.read(np.array([1]))
            except ValueError as error:
                found["wrong"] = str(error)
            found["first"] = next(
                e["step"] for e in context.events if e["event"] == "train/resumed"
            )
        found["faults"] = [(folder / name).exists() for name in ("died", "failed")]
        found["free"] = is_free_within(60)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

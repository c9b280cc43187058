"""Features and labels of a labelled split, stored once: every head of a study is scored on them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch

from stego_core.config.load import fingerprint, to_dict
from stego_core.config.schema import BackboneConfig, ImageLimits, TrainJob, TuneJob
from stego_core.datasets.directory import Dataset
from stego_core.distributed.cluster import plan_actors
from stego_core.distributed.evaluate_stages import (
    MAX_CLASSES,
    fetch_labelled,
    label_rows,
    pass_on,
)
from stego_core.distributed.fetch import WholeImage, pixel_groups
from stego_core.distributed.units import Stage, map_threads, receipt_table, run_units
from stego_core.images.apart import ApartDecoder
from stego_core.images.decode import ImageFailure
from stego_core.inference.scoring import count_pixels
from stego_core.masks.table import quarantine_table
from stego_core.model.backbone import load_backbone
from stego_core.model.registry import find_backbone
from stego_core.model.segmenter import Segmenter
from stego_core.storage import fs
from stego_core.storage.manifest import digest_files, write_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LabelledStore:
    """Where the features and labels of a split are.

    Attributes:
        uri: folder of `unit-<n>.safetensors`: `<row>.features` (C, h, w) float16 and
            `<row>.labels` (H, W) for each image that has both.
        num_units: files.
    """

    uri: str
    num_units: int

    @property
    def key(self) -> str:
        """Return the fingerprint of the features and labels."""
        return self.uri.rstrip("/").rsplit("/", 1)[1]

    def confusion(self, model: Segmenter) -> np.ndarray:
        """Return counts (255, N) int64 of all pixels, oriented [true, pred]; 0 without labels."""
        total = np.zeros((MAX_CLASSES, model.num_clusters), np.int64)
        for unit in range(self.num_units):
            tensors = safetensors.torch.load(fs.read_bytes(_unit_uri(self.uri, unit)))
            for name in sorted(tensors):
                if name.endswith(".features"):
                    labels = tensors[name.replace(".features", ".labels")].numpy()
                    total = total + count_pixels(model, tensors[name], labels)
        return total


def _unit_name(unit: int) -> str:
    return f"unit-{unit:08d}.safetensors"


def _unit_uri(uri: str, unit: int) -> str:
    return fs.join(uri, _unit_name(unit))


class StoreWorker:
    """The actor's part: features of whole images, written with their labels.

    Args:
        backbone: of the trials.
        batch: images of one pass.
        device: of torch.
        threads: batches computed at a time.
        limits: of the decoder.
        uri: folder of the store.
        weights_sha256: of the driver's weights.
    """

    def __init__(
        self,
        *,
        backbone: BackboneConfig,
        batch: int,
        device: str,
        threads: int,
        limits: ImageLimits,
        uri: str,
        weights_sha256: str,
    ) -> None:
        self._backbone = load_backbone(backbone, device=device, sha256=weights_sha256)
        self._batch, self._threads, self._uri = batch, threads, uri
        self._decoder = ApartDecoder(limits)

    def __call__(self, unit: int, table: pa.Table) -> pa.Table:
        """Write the unit; return how many images it has."""
        groups = pixel_groups(table, self._batch)
        maps = map_threads(lambda group: self._features(group[1]), groups, self._threads)
        tensors: dict[str, torch.Tensor] = {}
        failures: dict[int, ImageFailure] = {}
        for (rows, _), features in zip(groups, maps, strict=True):
            for row, one in zip(rows, features, strict=True):
                data = table["label"][row].as_py()
                labels = None if data is None else self._decoder.label(data)
                if isinstance(labels, ImageFailure):
                    failures[row] = labels
                elif labels is not None:
                    tensors[f"{row:08d}.features"] = one.contiguous()
                    tensors[f"{row:08d}.labels"] = torch.from_numpy(labels)
        fs.write_bytes(_unit_uri(self._uri, unit), safetensors.torch.save(tensors))
        columns = ["image_id", "image_uri", "status", "detail"]
        failed = quarantine_table(table.select(columns), stage="evaluate").to_pylist()
        failed += label_rows(table, failures)
        return receipt_table(unit=unit, images=len(tensors) // 2, failed=failed)

    def _features(self, pixels: np.ndarray) -> torch.Tensor:
        maps: torch.Tensor = self._backbone(self._backbone.prepare(torch.from_numpy(pixels)))
        return maps.cpu().half()


def store_labelled(
    job: TuneJob,
    trial: TrainJob,
    source: tuple[Dataset, Sequence[fs.ListedFile]],
    *,
    weights_sha256: str,
) -> LabelledStore:
    """Store what trials with this backbone are scored on; reuse what is there.

    Args:
        job: the study.
        trial: one of its trainings.
        source: the labelled split and its images.
        weights_sha256: of the backbone, which a path does not tell.
    """
    dataset, files = source
    labels = sorted(fs.list_files(str(dataset.labels_uri)), key=lambda file: file.path)
    backbone = find_backbone(trial.backbone.name)
    nearest = trial.compat.nearest_images
    key = fingerprint(
        to_dict(trial.backbone),
        weights_sha256,
        trial.limits.record(),
        to_dict(job.predict),
        digest_files(files),
        digest_files(labels),
        nearest,
    )
    uri = fs.join(job.out, "labelled", key)
    units = job.predict.unit_images
    manifest = write_manifest(fs.join(uri, "manifest.parquet"), files, unit_images=units)
    store = LabelledStore(uri, manifest.num_units)
    prepare = WholeImage(
        resolution=job.predict.resolution, patch=backbone.patch_size, nearest=nearest
    )
    fetch = {"manifest": manifest, "prepare": prepare, "dataset": dataset}
    work = {"backbone": trial.backbone, "weights_sha256": weights_sha256}
    limits = {"limits": trial.limits}
    receipts = _run(job, store, fetch | limits, work | limits)
    if failed := [row for receipt in receipts for row in receipt["failed"]]:
        uri, why = failed[0]["image_uri"], f"{failed[0]['reason']}, {failed[0]['detail']}"
        logger.warning(
            "%d images, or their labels, can't be used to score, the first %s: %s",
            *(len(failed), uri, why),
        )
    return store


def _run(
    job: TuneJob, store: LabelledStore, fetch: dict[str, Any], work: dict[str, Any]
) -> Iterable[dict[str, Any]]:
    def pending() -> list[int]:
        done = {*fs.list_names(store.uri)}
        names = (_unit_name(unit) for unit in range(store.num_units))
        return [unit for unit, name in enumerate(names) if name not in done]

    if not pending():
        return iter(())
    actors = plan_actors(1)
    work |= {
        "batch": job.predict.batch,
        "device": actors.device,
        "threads": actors.threads,
        "uri": store.uri,
    }
    return run_units(
        pending,
        fetch=Stage(fetch_labelled, fetch),
        work=Stage(StoreWorker, work),
        finish=Stage(pass_on, {}),
        actors=actors,
        seconds=work["limits"].max_seconds,
        debug=job.debug,
    )

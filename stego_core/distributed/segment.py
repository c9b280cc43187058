"""Bulk segmentation: a folder or bucket of images becomes a table of masks."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stego_core.config.load import dump_toml, fingerprint
from stego_core.config.schema import SegmentJob
from stego_core.datasets.demo import resolve_demo
from stego_core.distributed.cluster import connect, plan_actors
from stego_core.distributed.fetch import WholeImage, fetch_unit
from stego_core.distributed.progress import Progress
from stego_core.distributed.segment_stages import SegmentWorker, finish_unit, unit_uri
from stego_core.distributed.units import Stage, run_units
from stego_core.errors import ImageProblem, StegoError, TooManyFailures
from stego_core.inference.crf import require_crf
from stego_core.masks.palette import cluster_colors, color_hex
from stego_core.masks.table import QUARANTINE_SCHEMA, mask_metadata, quarantine_table, to_parquet
from stego_core.model.checkpoint import find_model, load_tensors
from stego_core.model.registry import find_backbone
from stego_core.storage import fs
from stego_core.storage.manifest import (
    Manifest,
    digest_files,
    list_images,
    read_manifest,
    write_manifest,
)
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)
SUCCESS = "_SUCCESS"


def plan_segment(job: SegmentJob) -> list[str]:
    """Return what a run would do, one line each, without touching anything."""
    folder = find_model(job.model)
    source = resolve_demo(job.input, write=False)
    lines = [f"model: {folder}", f"output: {job.out}"]
    if source is None:
        return [*lines, "input: the demo pictures, not written yet"]
    files = list_images(source, limit=job.limit)
    units = -(-len(files) // job.predict.unit_images)
    shards = -(-units // job.predict.shard_batches)
    done = len(fs.list_names(fs.join(job.out, "masks")))
    return [
        *lines,
        f"input: {source}: {len(files)} images, {sum(f.num_bytes for f in files)} bytes",
        f"work: {units} units in {shards} Parquet file(s), of which {done} are there",
        f"crf: {job.predict.crf if job.crf else 'off'}, flip: {'on' if job.flip else 'off'}, "
        f"mask size: {job.mask_size}",
    ]


def segment_bucket(job: SegmentJob, run: RunDirectory) -> None:
    """Segment every image below `job.input` into `job.out`; go on where an earlier run ended.

    Raises:
        InputError: if there are no images.
        CheckpointError: if there is no model, or the output holds results of other settings.
        TooManyFailures: if more images can't be used than `max_failed` allows; the rows are all
            there.
    """
    if job.crf:
        require_crf(job.predict.crf)
    folder = find_model(job.model)
    load_tensors(folder, "model")  # damaged files end the job here, before it leaves anything
    source = resolve_demo(job.input, write=True)
    assert source is not None  # noqa: S101 - write=True always returns a folder
    files = list_images(source, limit=job.limit)
    record = _record(job, folder, data=digest_files(files))
    is_same = run.claim(record, overwrite=job.overwrite)
    if is_same and run.read_json(SUCCESS):
        logger.info("%s is complete: nothing to do", job.out)
        _close(job, run, read_manifest(run.path("manifest.parquet")))
        return
    if not is_same:
        for name in ("masks", "_units", "manifest.parquet", SUCCESS):
            fs.delete(run.path(name))
    fs.write_bytes(run.path("config.resolved.toml"), dump_toml(job).encode())
    if not fs.exists(run.path("manifest.parquet")):
        write_manifest(run.path("manifest.parquet"), files, unit_images=job.predict.unit_images)
    manifest = read_manifest(run.path("manifest.parquet"))
    shards = _Shards(job, manifest, metadata=_metadata(folder, record))
    if shards.pending():
        with connect(debug=job.debug):
            _segment_units(job, run, folder, manifest, shards)
    _close(job, run, manifest)


def _segment_units(
    job: SegmentJob, run: RunDirectory, folder: str, manifest: Manifest, shards: _Shards
) -> None:
    card = json.loads(fs.read_bytes(fs.join(folder, "model.json")))
    patch = find_backbone(card["backbone"]["name"]).patch_size
    actors = plan_actors(job.actors)
    done = manifest.num_images - sum(shards.num_images(unit) for unit in shards.pending())
    progress = Progress(run, stage="segment", total=manifest.num_images, done=done)
    run.status("running", stage="segment")
    receipts = run_units(
        shards.pending,
        fetch=Stage(
            fetch_unit,
            {
                "manifest": manifest,
                "prepare": WholeImage(
                    resolution=job.predict.resolution,
                    patch=patch,
                    nearest=job.compat.nearest_images,
                ),
                "limits": job.limits,
            },
        ),
        work=Stage(
            SegmentWorker,
            {
                "model": folder,
                "precision": job.precision,
                "device": actors.device,
                "threads": actors.threads,
                "job": job,
            },
        ),
        finish=Stage(finish_unit, {"out": job.out, "job": job, "model": folder}),
        actors=actors,
        debug=job.debug,
    )
    for receipt in receipts:
        progress.add(receipt["statuses"])
        shards.unit_done(receipt["unit"])
    progress.finish()


class _Shards:
    """Which units are done, and the merging of their files into the files that users see.

    A unit's file is the unit of loss; a shard's file, `masks/part-<n>.parquet`, holds many units
    in manifest order and is written in one piece. A unit is done if either is there.
    """

    def __init__(self, job: SegmentJob, manifest: Manifest, *, metadata: dict[str, str]) -> None:
        self._out, self._manifest, self._metadata = job.out, manifest, metadata
        self._per_shard, self._unit_images = job.predict.shard_batches, job.predict.unit_images
        parts = fs.list_names(fs.join(self._out, "masks"))
        self._merged = {int(p[5:10]) for p in parts if p.startswith("part-")}
        units = fs.list_names(fs.join(self._out, "_units"))
        self._done = {int(u[5:13]) for u in units if u.endswith(".parquet")}
        for shard in range(-(-manifest.num_units // self._per_shard)):
            # A run may have died between writing a part and deleting its units, or before merging.
            self._merge_if_complete(shard)

    def pending(self) -> list[int]:
        """Return the units that are not done."""
        return [
            unit
            for unit in range(self._manifest.num_units)
            if unit not in self._done and unit // self._per_shard not in self._merged
        ]

    def num_images(self, unit: int) -> int:
        """Return the images of a unit."""
        last = unit == self._manifest.num_units - 1
        rest = self._manifest.num_images - unit * self._unit_images
        return rest if last else self._unit_images

    def unit_done(self, unit: int) -> None:
        """Take note of a unit's file; merge its shard if it was the last."""
        self._done.add(unit)
        self._merge_if_complete(unit // self._per_shard)

    def _merge_if_complete(self, shard: int) -> None:
        first = shard * self._per_shard
        units = range(first, min(first + self._per_shard, self._manifest.num_units))
        if shard not in self._merged:
            if not self._done.issuperset(units):
                return
            data = [fs.read_bytes(unit_uri(self._out, unit)) for unit in units]
            table = pa.concat_tables([pq.read_table(pa.BufferReader(d)) for d in data])
            part = fs.join(self._out, "masks", f"part-{shard:05d}.parquet")
            fs.write_bytes(part, to_parquet(table, self._metadata))
            self._merged.add(shard)
        for unit in self._done.intersection(units):
            fs.delete(unit_uri(self._out, unit))


def _close(job: SegmentJob, run: RunDirectory, manifest: Manifest) -> None:
    """Check ids against the manifest, write quarantine and `_SUCCESS`, apply the budget."""
    columns = ["image_id", "image_uri", "status", "detail"]
    parts = [n for n in fs.list_names(run.path("masks")) if n.endswith(".parquet")]
    tables = []
    for part in parts:
        filesystem, path = fs.open_uri(run.path("masks", part))
        tables.append(pq.read_table(path, filesystem=filesystem, columns=columns))
    masks = pa.concat_tables(tables)
    expected = manifest.read(["image_id"])["image_id"].to_numpy()
    if not np.array_equal(masks["image_id"].to_numpy(), expected):
        raise StegoError(f"{job.out}/masks does not hold the manifest's rows once each")
    statuses = Counter(masks["status"].to_pylist())
    quarantine = quarantine_table(masks, stage="segment").cast(QUARANTINE_SCHEMA)
    fs.write_bytes(run.path("quarantine.parquet"), to_parquet(quarantine, {}))
    digest = hashlib.sha256(expected.tobytes()).hexdigest()
    run.write_json(
        SUCCESS, {"rows": len(expected), "statuses": dict(statuses), "ids_sha256": digest}
    )
    ok = statuses[ImageProblem.OK]
    run.count(total=len(expected), done=len(expected), **statuses)
    failed = len(expected) - ok
    if failed > job.max_failed * len(expected) or not ok:
        raise TooManyFailures(
            f"{failed} of {len(expected)} images can't be used; {job.out}/quarantine.parquet "
            "says why (--max-failed sets the share that is allowed)"
        )
    logger.info("%d images segmented, %d quarantined: %s/masks", ok, failed, job.out)


def _record(job: SegmentJob, folder: str, *, data: str) -> dict[str, Any]:
    """Return all that determines the masks: an output made with anything else is refused."""
    model = hashlib.sha256(fs.read_bytes(fs.join(folder, "model.safetensors")))
    model.update(fs.read_bytes(fs.join(folder, "model.json")))
    return {
        "model": model.hexdigest(),
        "data": data,
        "predict": asdict(job.predict),
        "limits": asdict(job.limits),
        "crf": job.crf,
        "flip": job.flip,
        "mask_size": job.mask_size,
        "precision": job.precision,
        "compat": asdict(job.compat),
    }


def _metadata(folder: str, record: dict[str, Any]) -> dict[str, str]:
    card = json.loads(fs.read_bytes(fs.join(folder, "model.json")))
    names = card["cluster_names"]
    colors = [color_hex(color) for color in cluster_colors(len(names))]
    return mask_metadata(fingerprint(record), names, colors)

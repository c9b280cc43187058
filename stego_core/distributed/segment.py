"""Bulk segmentation: a folder or bucket of images becomes a table of masks."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from stego_core.config.load import dump_toml, fingerprint
from stego_core.config.schema import SegmentJob
from stego_core.datasets.demo import resolve_demo
from stego_core.distributed.cluster import connect, plan_actors
from stego_core.distributed.fetch import WholeImage, fetch_unit
from stego_core.distributed.precision import PRECISION, settle_precision
from stego_core.distributed.progress import Progress
from stego_core.distributed.segment_finish import finish_unit, masks_rows
from stego_core.distributed.segment_plan import planned_work
from stego_core.distributed.segment_stages import SegmentWorker
from stego_core.distributed.shards import NEXT, Shards, extend, finish_extension, unread_images
from stego_core.distributed.units import Stage, run_units, units_at_once
from stego_core.errors import ImageProblem, StegoError, TooManyFailures
from stego_core.inference.crf import describe_crf, require_crf
from stego_core.masks.palette import cluster_colors, color_hex
from stego_core.masks.table import QUARANTINE_SCHEMA, mask_metadata, quarantine_table, to_parquet
from stego_core.masks.verify import SUCCESS, mask_columns, verify_output
from stego_core.model.checkpoint import find_model, load_tensors
from stego_core.model.registry import find_backbone
from stego_core.storage import fs
from stego_core.storage.lease import Lease, hold
from stego_core.storage.manifest import (
    MAX_IMAGES,
    Manifest,
    digest_files,
    list_images,
    read_manifest,
    write_manifest,
)
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)

_RESULTS = (SUCCESS, NEXT, PRECISION, "masks", "_units", "manifest.parquet")  # in this order gone


def plan_segment(job: SegmentJob) -> list[str]:
    """Return what a run would do, one line each, without touching anything."""
    folder = find_model(job.model)
    source = resolve_demo(job.input, write=False)
    lines = [f"model: {folder}", f"output: {job.out}"]
    if source is None:
        return [*lines, "input: the demo pictures, not written yet"]
    files = _list_input(job, source)
    card = json.loads(fs.read_bytes(fs.join(folder, "model.json")))
    record = _record(job, folder, source=source)
    return [
        *lines,
        f"input: {source}: {len(files)} images, {sum(f.num_bytes for f in files)} bytes",
        *planned_work(job, files, record, card["backbone"]),
        f"{describe_crf(job.predict, is_on=job.crf)}, flip: {'on' if job.flip else 'off'}, "
        f"mask size: {job.mask_size}",
    ]


def _list_input(job: SegmentJob, source: str) -> Sequence[fs.ListedFile]:
    """Return the images to segment; an output below its input, and its report, are none of them."""
    folder = source.rstrip("/") + "/"
    below = f"{job.out.rstrip('/')}/".removeprefix(folder) if job.out.startswith(folder) else None
    return list_images(source, limit=job.limit, most=MAX_IMAGES, without=below or None)


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
    files = _list_input(job, source)
    record = _record(job, folder, source=source)
    with hold(job.out) as lease:
        run.refuse_others(_RESULTS)
        is_same = run.claim(record, overwrite=job.overwrite, clear=lambda: _clear(run))
        manifest_uri = run.path("manifest.parquet")
        is_complete = is_same and run.read_json(SUCCESS)
        is_listed = is_complete and read_manifest(manifest_uri).digest == digest_files(files)
        if is_listed and not (job.retry and len(unread_images(job.out, files))):
            logger.info("%s is complete: nothing to do", job.out)
            _close(job, run)
            return
        fs.write_bytes(run.path("config.resolved.toml"), dump_toml(job).encode())
        lease.check()
        finish_extension(run)
        if not fs.exists(manifest_uri):
            write_manifest(manifest_uri, files, unit_images=job.predict.unit_images)
        metadata = _metadata(folder, record)
        # The list that an earlier run began with first; then what has changed since.
        _complete(job, run, folder, metadata, lease)
        again = unread_images(job.out, files) if job.retry else np.zeros(0, np.int64)
        if len(again) or read_manifest(manifest_uri).digest != digest_files(files):
            lease.check()
            extend(run, files, predict=job.predict, again=again)
            _complete(job, run, folder, metadata, lease)
        lease.check()
        _close(job, run)


def _clear(run: RunDirectory) -> None:
    """Delete all results; what is left after any of these is an unfinished output."""
    for name in _RESULTS:
        fs.delete(run.path(name))


def _complete(
    job: SegmentJob, run: RunDirectory, folder: str, metadata: dict[str, str], lease: Lease
) -> None:
    """Do the units of the manifest that are not done."""
    manifest = read_manifest(run.path("manifest.parquet"))
    shards = Shards(job.out, manifest.uri, per_shard=job.predict.shard_batches, metadata=metadata)
    if shards.pending():
        with connect(debug=job.debug):
            _segment_units(job, run, folder, manifest, shards, lease)


def _segment_units(
    job: SegmentJob,
    run: RunDirectory,
    folder: str,
    manifest: Manifest,
    shards: Shards,
    lease: Lease,
) -> None:
    card = json.loads(fs.read_bytes(fs.join(folder, "model.json")))
    patch = find_backbone(card["backbone"]["name"]).patch_size
    actors = plan_actors(job.actors)
    precision = settle_precision(run, job.precision)
    done = manifest.num_images - sum(shards.num_images(unit) for unit in shards.pending())
    at_once = units_at_once(actors)
    progress = Progress(run, stage="segment", total=manifest.num_images, at_once=at_once, done=done)
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
                "root": resolve_demo(job.input, write=False),
            },
        ),
        work=Stage(
            SegmentWorker,
            {
                "model": folder,
                "precision": precision,
                "device": actors.device,
                "threads": actors.threads,
                "job": job,
            },
            probe=SegmentWorker,
        ),
        finish=Stage(finish_unit, {"folder": shards.folder, "job": job}, probe=masks_rows),
        actors=actors,
        seconds=job.limits.max_seconds,
        debug=job.debug,
    )
    for receipt in receipts:
        lease.check()
        progress.add(receipt["statuses"])
        shards.unit_done(receipt["unit"])
    progress.finish()


def _close(job: SegmentJob, run: RunDirectory) -> None:
    """Check ids against the manifest, write quarantine and `_SUCCESS`, apply the budget."""
    found = verify_output(job.out)
    if not found.is_ordered:
        raise StegoError(
            f"{job.out}/masks does not hold the manifest's rows once each ({found.lost} lost, "
            f"{found.duplicated} duplicated, {found.foreign} foreign): give another --out"
        )
    statuses = Counter(found.statuses)
    columns = ["image_id", "image_uri", "status", "detail"]
    failed_rows = [quarantine_table(t, stage="segment") for t in mask_columns(job.out, columns)]
    quarantine = pa.concat_tables(failed_rows).cast(QUARANTINE_SCHEMA)
    fs.write_bytes(run.path("quarantine.parquet"), to_parquet(quarantine, {}))
    fs.delete(run.path("_units"))
    run.write_json(SUCCESS, found.record())
    ok = statuses[ImageProblem.OK]
    run.count(total=found.rows, done=found.rows, **statuses)
    failed = found.rows - ok
    if failed > job.max_failed * found.rows or not ok:
        reasons = ", ".join(f"{n} {why}" for why, n in statuses.most_common() if why != "ok")
        raise TooManyFailures(
            f"{failed} of {found.rows} images can't be used ({reasons}); "
            f"{job.out}/quarantine.parquet lists them (--max-failed sets the share that is allowed)"
        )
    logger.info("%d images segmented, %d quarantined: %s/masks", ok, failed, job.out)


def _record(job: SegmentJob, folder: str, *, source: str) -> dict[str, Any]:
    """Return all that determines the masks: an output made with anything else is refused."""
    model = hashlib.sha256(fs.read_bytes(fs.join(folder, "model.safetensors")))
    model.update(fs.read_bytes(fs.join(folder, "model.json")))
    predict = asdict(job.predict)
    if not job.crf or job.predict.crf_device == "cpu":
        del predict["crf_device"]  # an output of before this setting is still the same
    return {
        "model": model.hexdigest(),
        "input": source.rstrip("/") or "/",
        "predict": predict,
        "limits": job.limits.record(),
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

"""What a segmentation would do with its output, for the plan of a dry run: nothing is touched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from stego_core.config.schema import SegmentJob
from stego_core.distributed.estimate import predicting_time
from stego_core.distributed.shards import unread_images
from stego_core.log import redact
from stego_core.masks.verify import SUCCESS, part_number
from stego_core.storage import fs
from stego_core.storage.extend import compare
from stego_core.storage.manifest import manifest_table, read_manifest
from stego_core.storage.run import RunDirectory, differing


def planned_work(
    job: SegmentJob,
    files: Sequence[fs.ListedFile],
    record: dict[str, Any],
    backbone: dict[str, Any],
) -> list[str]:
    """Return what is done, left or refused, and about how long what is left takes.

    Args:
        job: the settings.
        files: the input as it is now.
        record: of everything that determines the masks.
        backbone: settings of the model's.
    """
    run = RunDirectory(job.out, job="plan")
    earlier = run.read_json("fingerprint.json")
    record = json.loads(redact(json.dumps(record)))
    keys = [] if earlier is None else differing(earlier, record)
    if keys and not job.overwrite:
        return [f"work: refused without --overwrite, other than what is there: {', '.join(keys)}"]
    if earlier is None or keys or not fs.exists(run.path("manifest.parquet")):
        again = ", in place of what other settings made" if keys else ""
        return [
            f"work: {_units(job, len(files))}{again}",
            *predicting_time(job, backbone, len(files)),
        ]
    return _continued(job, run, files, backbone)


def _continued(
    job: SegmentJob, run: RunDirectory, files: Sequence[fs.ListedFile], backbone: dict[str, Any]
) -> list[str]:
    manifest = read_manifest(run.path("manifest.parquet"))
    left = 0
    if run.read_json(SUCCESS) is None:
        units = {name for key in fs.list_names(run.path("_units")) for name in _done(run, key)}
        images = sum(manifest.sizes()[unit] for unit in units if unit < manifest.num_units)
        parts = [n for n in fs.list_names(run.path("masks")) if part_number(n) is not None]
        merged = sum(fs.read_footer(run.path("masks", part)).num_rows for part in parts)
        left = max(0, manifest.num_images - merged - images)
    again = unread_images(job.out, files) if job.retry else np.zeros(0, np.int64)
    counts = compare(manifest.read(), manifest_table(files), again=again).counts()
    fresh = counts["added"] + counts["changed"]
    if not left + fresh + counts["gone"]:
        return ["work: nothing to do, the output is complete"]
    changes = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    since = f"; since its list was written: {changes}" if changes else ""
    what = f"work: {left} of {manifest.num_images} images are left of an earlier run{since}"
    return [what, *predicting_time(job, backbone, left + fresh)]


def _done(run: RunDirectory, key: str) -> list[int]:
    names = fs.list_names(run.path("_units", key))
    return [int(name[5:13]) for name in names if name.endswith(".parquet")]


def _units(job: SegmentJob, num_images: int) -> str:
    units = -(-num_images // job.predict.unit_images)
    shards = -(-units // job.predict.shard_batches)
    return f"{units} units in {shards} Parquet file(s)"

"""Images that mining could not use: their table, and trying again those whose reason may pass."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stego_core.config.load import fingerprint
from stego_core.config.schema import MineJob
from stego_core.distributed.quarantine import write_quarantine
from stego_core.errors import InputError
from stego_core.masks.table import may_pass
from stego_core.storage.feature_store import Views, drop_units
from stego_core.storage.manifest import Manifest
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)


def forget_failures(store_uri: str, manifest: Manifest) -> None:
    """Make the units pending again in which an image failed for a reason that may pass."""
    units = drop_units(
        store_uri, manifest.num_units, lambda table: bool(pc.any(may_pass(table)).as_py())
    )
    if units:
        logger.info("images that could not be read: %d units are done again", len(units))


def views_key(key: str, views: Views) -> str:
    """Return the key of what is made of these views.

    It differs from that of the store where images are missing that `--retry` may bring back.
    """
    table = pa.table(
        {
            "status": pa.array([problem for _, problem, _ in views.failures], pa.string()),
            "detail": pa.array([detail for _, _, detail in views.failures], pa.string()),
        }
    )
    ids = np.array([image for image, _, _ in views.failures], np.int64)
    missing = ids[may_pass(table).to_numpy().astype(bool)]
    return fingerprint(key, missing.tolist()) if len(missing) else key


def quarantine_failures(
    job: MineJob, run: RunDirectory, views: Views, manifest: Manifest, *, store_uri: str
) -> None:
    """Write the quarantine table.

    Raises:
        TooManyFailures: if more images can't be used than `max_failed` allows.
        InputError: if none can be used.
    """
    table = manifest.read(["image_id", "image_uri"])
    uris = dict(zip(table["image_id"].to_pylist(), table["image_uri"].to_pylist(), strict=True))
    rows = [
        {"image_id": i, "image_uri": uris[i], "stage": "mine", "reason": reason, "detail": detail}
        for i, reason, detail in views.failures
    ]
    if not len(views.image_ids):
        forget_failures(store_uri, manifest)  # else the next run would not look again
    write_quarantine(run, rows, num_images=manifest.num_images, max_failed=job.max_failed)
    if not len(views.image_ids):
        raise InputError(
            f"none of {len(rows)} images can be used, the first: {rows[0]['detail']}; "
            f"{run.uri}/quarantine.parquet has the reasons"
        )

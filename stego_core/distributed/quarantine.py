"""The quarantine table of a job that has no masks table: the images that could not be used."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from stego_core.errors import TooManyFailures
from stego_core.masks.table import QUARANTINE_SCHEMA, to_parquet
from stego_core.storage import fs
from stego_core.storage.run import RunDirectory


def write_quarantine(
    run: RunDirectory, rows: list[dict[str, Any]], *, num_images: int, max_failed: float
) -> None:
    """Write `quarantine.parquet`, and judge whether too many images are in it.

    Args:
        run: of the job.
        rows: of the table; see `QUARANTINE_SCHEMA`. Those of labels do not count as failed images.
        num_images: of the job.
        max_failed: share of them that may be in it.

    Raises:
        TooManyFailures: if there are more.
    """
    table = pa.Table.from_pylist(rows, QUARANTINE_SCHEMA)
    fs.write_bytes(run.path("quarantine.parquet"), to_parquet(table, {}))
    failed = sum(row["stage"] != "label" for row in rows)  # labels only add metrics
    if failed > max_failed * num_images:
        raise TooManyFailures(
            f"{failed} of {num_images} images can't be used; {run.uri}/quarantine.parquet says "
            "why (--max-failed sets the share that is allowed)"
        )

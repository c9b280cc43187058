"""A report that another job writes is left to it."""

from __future__ import annotations

import pytest

from stego_core.config.schema import ReportJob
from stego_core.errors import CheckpointError
from stego_core.masks.table import SCHEMA, mask_metadata, to_parquet
from stego_core.storage import fs
from stego_core.storage.lease import hold
from stego_core.storage.run import RunDirectory
from stego_core.viz.build import build_report


def test_a_report_that_another_job_writes_is_refused_and_then_made(tmp_path):
    masks = str(tmp_path / "masks-of-nothing")
    metadata = mask_metadata("key", ["cluster 0"], ["#ff0000"])
    data = to_parquet(SCHEMA.empty_table(), metadata)
    fs.write_bytes(f"{masks}/masks/part-00000.parquet", data)
    job, run = ReportJob(masks=masks), RunDirectory(f"{masks}/report", job="report")
    with hold(run.uri), pytest.raises(CheckpointError, match="another job"):
        build_report(job, run)
    assert not fs.exists(f"{run.uri}/index.html")
    build_report(job, run)
    assert fs.exists(f"{run.uri}/index.html")

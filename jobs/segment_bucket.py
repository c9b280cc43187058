#!/usr/bin/env python3
"""Segment every image of a folder or bucket into Parquet."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# `ray job submit jobs/segment_bucket.py` runs this file as it is: find the package next to it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stego_core.config.schema import SegmentJob
from stego_core.distributed.job import run_job
from stego_core.storage.run import RunDirectory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with these flags (without them: those of the command line)."""

    def plan(job: SegmentJob) -> list[str]:
        from stego_core.distributed.segment import plan_segment

        return plan_segment(job)

    def run(job: SegmentJob, directory: RunDirectory) -> None:
        from stego_core.distributed.segment import segment_bucket

        segment_bucket(job, directory)

    return run_job(
        SegmentJob,
        argv,
        prog="segment_bucket.py",
        plan=plan,
        run=run,
        directory=lambda job: job.out,
    )


if __name__ == "__main__":
    sys.exit(main())

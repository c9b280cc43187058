#!/usr/bin/env python3
"""Bring an official data set into the layout that the other jobs read."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

# `ray job submit jobs/prepare_data.py` runs this file as it is: find the package next to it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stego_core.config.schema import PrepareJob
from stego_core.distributed.job import run_job
from stego_core.storage.run import RunDirectory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with these flags (without them: those of the command line)."""

    def plan(job: PrepareJob) -> list[str]:
        from stego_core.datasets.prepare import plan_prepare

        return plan_prepare(job)

    def run(job: PrepareJob, directory: RunDirectory) -> None:
        from stego_core.datasets.prepare import prepare
        from stego_core.distributed.data import decoders

        cores = os.cpu_count() or 1
        prepare(job, directory, decoders(job.limits, at_once=min(job.threads, cores)))

    return run_job(
        PrepareJob,
        argv,
        prog="prepare_data.py",
        plan=plan,
        run=run,
        directory=lambda job: job.out,
    )


if __name__ == "__main__":
    sys.exit(main())

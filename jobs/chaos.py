#!/usr/bin/env python3
"""Segment or train again and again while processes and nodes are killed; count what is lost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# `ray job submit jobs/chaos.py` runs this file as it is: find the package next to it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stego_core.config.schema import ChaosJob
from stego_core.distributed.job import run_job
from stego_core.storage.run import RunDirectory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with these flags (without them: those of the command line)."""

    def plan(job: ChaosJob) -> list[str]:
        from stego_core.distributed.chaos import plan_soak

        return plan_soak(job)

    def run(job: ChaosJob, directory: RunDirectory) -> None:
        from stego_core.distributed.chaos import soak

        soak(job, directory, jobs=Path(__file__).resolve().parent)

    return run_job(
        ChaosJob,
        argv,
        prog="chaos.py",
        plan=plan,
        run=run,
        directory=lambda job: job.out,
    )


if __name__ == "__main__":
    sys.exit(main())

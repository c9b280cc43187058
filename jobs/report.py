#!/usr/bin/env python3
"""Make an HTML report of masks, training and metrics."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# `ray job submit jobs/report.py` runs this file as it is: find the package next to it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stego_core.config.load import dump_toml
from stego_core.config.schema import ReportJob
from stego_core.distributed.job import run_job
from stego_core.storage import fs
from stego_core.storage.run import RunDirectory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with these flags (without them: those of the command line)."""

    def plan(job: ReportJob) -> list[str]:
        from stego_core.viz.build import plan_report

        return plan_report(job)

    def run(job: ReportJob, directory: RunDirectory) -> None:
        from stego_core.viz.build import build_report

        build_report(job, directory)
        # Last: a report that can't be made must not change what stands beside an older page.
        fs.write_bytes(directory.path("config.resolved.toml"), dump_toml(job).encode())

    return run_job(
        ReportJob,
        argv,
        prog="report.py",
        plan=plan,
        run=run,
        directory=lambda job: fs.join(job.masks, "report"),
    )


if __name__ == "__main__":
    sys.exit(main())

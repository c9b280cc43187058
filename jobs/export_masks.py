#!/usr/bin/env python3
"""Write masks as PNG files in the tree of their pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# `ray job submit jobs/export_masks.py` runs this file as it is: find the package next to it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stego_core.config.export import ExportJob
from stego_core.distributed.job import run_job
from stego_core.storage.run import RunDirectory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with these flags (without them: those of the command line)."""

    def plan(job: ExportJob) -> list[str]:
        from stego_core.distributed.export import plan_export

        return plan_export(job)

    def run(job: ExportJob, directory: RunDirectory) -> None:
        from stego_core.distributed.export import export_masks

        export_masks(job, directory)

    return run_job(
        ExportJob,
        argv,
        prog="export_masks.py",
        plan=plan,
        run=run,
        directory=lambda job: job.out,
    )


if __name__ == "__main__":
    sys.exit(main())

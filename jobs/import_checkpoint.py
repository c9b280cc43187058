#!/usr/bin/env python3
"""Turn a checkpoint of the original STEGO code into a model, running none of its code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# `ray job submit jobs/import_checkpoint.py` runs this file as it is: find the package next to it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stego_core.config.schema import ImportJob
from stego_core.distributed.job import run_job
from stego_core.storage.run import RunDirectory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with these flags (without them: those of the command line)."""

    def plan(job: ImportJob) -> list[str]:
        from stego_core.model.lightning import plan_import

        return plan_import(job)

    def run(job: ImportJob, directory: RunDirectory) -> None:
        from stego_core.model.lightning import import_checkpoint

        import_checkpoint(job, directory)

    return run_job(
        ImportJob,
        argv,
        prog="import_checkpoint.py",
        plan=plan,
        run=run,
        directory=lambda job: job.out,
    )


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Study how results depend on settings: many trainings on Ray Tune, judged without labels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# `ray job submit jobs/tune.py` runs this file as it is: find the package next to it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stego_core.config.schema import TuneJob
from stego_core.distributed.job import run_job
from stego_core.storage.run import RunDirectory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with these flags (without them: those of the command line)."""

    def plan(job: TuneJob) -> list[str]:
        from stego_core.distributed.tune import plan_tune

        return plan_tune(job)

    def run(job: TuneJob, directory: RunDirectory) -> None:
        from stego_core.distributed.tune import tune_study

        tune_study(job, directory)

    return run_job(TuneJob, argv, prog="tune.py", plan=plan, run=run, directory=lambda job: job.out)


if __name__ == "__main__":
    sys.exit(main())

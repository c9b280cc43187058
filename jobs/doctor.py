#!/usr/bin/env python3
"""Check that jobs can run here, one line a check; the exit code says whether to go on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# `ray job submit jobs/doctor.py` runs this file as it is: find the package next to it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stego_core.config.doctor import DoctorJob
from stego_core.distributed.job import run_job


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks with these flags (without them: those of the command line)."""

    def plan(job: DoctorJob) -> list[str]:
        from stego_core.distributed.doctor import plan_doctor

        return plan_doctor(job)

    def run(job: DoctorJob) -> None:
        from stego_core.distributed.doctor import diagnose

        diagnose(job)

    return run_job(DoctorJob, argv, prog="doctor.py", plan=plan, run=run, directory=None)


if __name__ == "__main__":
    sys.exit(main())

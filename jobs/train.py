#!/usr/bin/env python3
"""Distil a segmentation head on a folder or bucket of images; labels are not needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# `ray job submit jobs/train.py` runs this file as it is: find the package next to it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stego_core.config.schema import TrainJob
from stego_core.distributed.job import run_job
from stego_core.storage.run import RunDirectory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with these flags (without them: those of the command line)."""

    def plan(job: TrainJob) -> list[str]:
        from stego_core.distributed.train import plan_train

        return plan_train(job)

    def run(job: TrainJob, directory: RunDirectory) -> None:
        from stego_core.distributed.train import train_model

        train_model(job, directory)

    return run_job(
        TrainJob, argv, prog="train.py", plan=plan, run=run, directory=lambda job: job.out
    )


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Score a model on labelled images, beside k-means on the frozen features."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# `ray job submit jobs/evaluate.py` runs this file as it is: find the package next to it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stego_core.config.schema import EvaluateJob
from stego_core.distributed.job import run_job
from stego_core.storage.run import RunDirectory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with these flags (without them: those of the command line)."""

    def plan(job: EvaluateJob) -> list[str]:
        from stego_core.distributed.evaluate import plan_evaluate

        return plan_evaluate(job)

    def run(job: EvaluateJob, directory: RunDirectory) -> None:
        from stego_core.distributed.evaluate import evaluate

        evaluate(job, directory)

    return run_job(
        EvaluateJob, argv, prog="evaluate.py", plan=plan, run=run, directory=lambda job: job.out
    )


if __name__ == "__main__":
    sys.exit(main())

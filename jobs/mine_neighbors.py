#!/usr/bin/env python3
"""Embed every training view of a data set and find its nearest neighbours."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# `ray job submit jobs/mine_neighbors.py` runs this file as it is: find the package next to it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stego_core.config.schema import MineJob
from stego_core.distributed.job import run_job
from stego_core.storage.run import RunDirectory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job with these flags (without them: those of the command line)."""

    def plan(job: MineJob) -> list[str]:
        from stego_core.distributed.mine import plan_mine

        return plan_mine(job)

    def run(job: MineJob, directory: RunDirectory) -> None:
        from stego_core.distributed.mine import mine_neighbors

        mine_neighbors(job, directory)

    return run_job(
        MineJob, argv, prog="mine_neighbors.py", plan=plan, run=run, directory=lambda job: job.out
    )


if __name__ == "__main__":
    sys.exit(main())

"""A driver on a Ray of its own; prints which units waited in vain for another to be finished.

What is defined in a script travels to the workers as it is, so they need not know this file.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import ray

from stego_core.distributed.cluster import connect, plan_actors
from stego_core.distributed.units import Stage, receipt_table, run_units

UNITS = 16
AHEAD = 9  # units that may be read before the first is finished
PATIENCE_S = 120  # of a busy machine, on which a process takes long to start


def fetch(unit, *, mark, deaths=0):
    """Read, slowly; once enough is read wait until something is finished."""
    time.sleep(0.2)
    end = time.monotonic() + PATIENCE_S
    while unit >= AHEAD and not Path(mark).exists():
        if time.monotonic() > end:
            Path(mark).touch()  # one wait is enough
            return pa.table({"in_vain": [True]})
        time.sleep(0.1)
    return pa.table({"in_vain": [False]})


class Work:
    """The actor's part, slower than reading and finishing."""

    def __call__(self, unit, table):
        time.sleep(0.8)
        return table


def finish(unit, table, *, mark):
    """Leave the mark."""
    Path(mark).touch()
    return receipt_table(unit=unit, in_vain=table["in_vain"][0].as_py())


def main():
    """Print one JSON list of units."""
    done = {}
    mark = str(Path(tempfile.mkdtemp()) / "finished")
    ray.init("local", num_cpus=2, include_dashboard=False)
    with connect():
        receipts = run_units(
            lambda: [unit for unit in range(UNITS) if unit not in done],
            fetch=Stage(fetch, {"mark": mark}),
            work=Stage(Work, {}),
            finish=Stage(finish, {"mark": mark}),
            actors=plan_actors(1),
            seconds=3 * PATIENCE_S,
        )
        for receipt in receipts:
            done[receipt["unit"]] = receipt
    sys.stdout.write(json.dumps([unit for unit, receipt in done.items() if receipt["in_vain"]]))


if __name__ == "__main__":
    main()

"""A driver on a Ray of its own; prints when each unit began to be computed and was finished.

What is defined in a script travels to the workers as it is, so they need not know this file.
"""

from __future__ import annotations

import json
import sys
import time

import pyarrow as pa
import ray

from stego_core.distributed.cluster import connect, plan_actors
from stego_core.distributed.units import Stage, receipt_table, run_units

UNITS = 16


def fetch(unit, *, deaths=0):
    """Read, for a while."""
    time.sleep(0.2)
    return pa.table({"unit": [unit]})


class Work:
    """The actor's part, slower than reading and finishing."""

    def __call__(self, unit, table):
        began = time.time()
        time.sleep(0.8)
        return pa.table({"began": [began]})


def finish(unit, table):
    """Return both times."""
    return receipt_table(unit=unit, began=table["began"][0].as_py(), finished=time.time())


def main():
    """Print one JSON list of receipts."""
    done = {}
    ray.init("local", num_cpus=2, include_dashboard=False)
    with connect():
        receipts = run_units(
            lambda: [unit for unit in range(UNITS) if unit not in done],
            fetch=Stage(fetch, {}),
            work=Stage(Work, {}),
            finish=Stage(finish, {}),
            actors=plan_actors(1),
            seconds=60,
        )
        for receipt in receipts:
            done[receipt["unit"]] = receipt
    sys.stdout.write(json.dumps(list(done.values())))


if __name__ == "__main__":
    main()

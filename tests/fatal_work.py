"""A driver whose model and CRF fail at pictures of certain colours; prints what they became.

Run as `python tests/fatal_work.py PICTURES MANIFEST SECONDS`; the last is what a picture may take.
What is defined in a script travels to the workers as it is, so they need not know this file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from stego_core.config.schema import ImageLimits
from stego_core.distributed import units
from stego_core.distributed.cluster import connect, plan_actors
from stego_core.distributed.fetch import WholeImage, fetch_unit
from stego_core.distributed.units import Stage, receipt_table, run_units
from stego_core.storage.manifest import list_images, write_manifest

# The red of the pictures at which the actor dies, fails or hangs, and at which the last task dies.
KILL, RAISE, HANG, KILL_LATE = 10, 20, 30, 40


def reds(table):
    """Return the first byte of each picture that is there."""
    return [data[0] for data in table["pixels"].to_pylist() if data is not None]


class Model:
    """The actor's part."""

    def __call__(self, unit, table):
        found = reds(table)
        if KILL in found:
            os.kill(os.getpid(), signal.SIGKILL)
        if RAISE in found:
            raise RuntimeError("this one")
        if HANG in found:
            time.sleep(3600)
        return table


def crf(unit, table):
    """The last stage, without what it writes."""
    if KILL_LATE in reds(table):
        os.kill(os.getpid(), signal.SIGKILL)


def finish(unit, table):
    """Return names, statuses and reasons."""
    crf(unit, table)
    columns = table.select(["path", "status", "detail"]).to_pylist()
    return receipt_table(unit=unit, rows=[list(row.values()) for row in columns])


def main():
    """Print one JSON list of rows."""
    pictures, manifest_uri, seconds = sys.argv[1:]
    manifest = write_manifest(manifest_uri, list_images(pictures), unit_images=8)
    units._UNIT_S = 5  # after which an actor that hangs is ended
    fetch = {
        "manifest": manifest,
        "prepare": WholeImage(resolution=32, patch=16),
        "limits": ImageLimits(),
    }
    done = {}
    with connect():
        receipts = run_units(
            lambda: [unit for unit in range(manifest.num_units) if unit not in done],
            fetch=Stage(fetch_unit, fetch),
            work=Stage(Model, {}, probe=Model),
            finish=Stage(finish, {}, probe=crf),
            actors=plan_actors(1),
            seconds=float(seconds),
        )
        for receipt in receipts:
            assert receipt["unit"] not in done
            done[receipt["unit"]] = receipt["rows"]
    sys.stdout.write(json.dumps([row for unit in sorted(done) for row in done[unit]]))


if __name__ == "__main__":
    main()

"""A driver whose decoder kills or hangs its process at marked pictures; prints what they became.

Run as `python tests/fatal_decoder.py PICTURES MANIFEST`. What is defined in a script travels to the
workers as it is, so they need not know this file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from stego_core.config.schema import ImageLimits
from stego_core.distributed.cluster import connect, plan_actors
from stego_core.distributed.fetch import WholeImage, fetch_unit
from stego_core.distributed.units import Stage, receipt_table, run_units
from stego_core.images.decode import decode_image
from stego_core.storage.manifest import list_images, write_manifest

KILL, HANG, ONCE = b"kill the process", b"never come back", b"kill the first process"


def decoder(data, limits):
    """Decode, unless the picture is marked behind its end."""
    if data.endswith(KILL):
        os.kill(os.getpid(), signal.SIGKILL)  # what a fault in native code and the OOM killer do
    if data.endswith(HANG):
        time.sleep(3600)
    if ONCE in data:
        note = Path(data.rpartition(ONCE)[2].decode())
        if not note.exists():
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return decode_image(data, limits)


class PassOn:
    """An actor's part that does nothing."""

    def __call__(self, unit, table):
        return table.select(["path", "status", "detail", "pixels"])


def finish(unit, table):
    """Return names, statuses and the sizes of what was decoded."""
    rows = [
        [row["path"], row["status"], row["detail"], len(row["pixels"] or b"")]
        for row in table.to_pylist()
    ]
    return receipt_table(unit=unit, rows=rows)


def main():
    """Print one JSON list of rows."""
    pictures, manifest_uri = sys.argv[1:]
    manifest = write_manifest(manifest_uri, list_images(pictures), unit_images=8)
    done = {}
    with connect():
        receipts = run_units(
            lambda: [unit for unit in range(manifest.num_units) if unit not in done],
            fetch=Stage(
                fetch_unit,
                {
                    "manifest": manifest,
                    "prepare": WholeImage(resolution=32, patch=16),
                    "limits": ImageLimits(max_seconds=8),
                    "decoder": decoder,
                },
            ),
            work=Stage(PassOn, {}),
            finish=Stage(finish, {}),
            actors=plan_actors(1),
            seconds=2,
        )
        for receipt in receipts:
            assert receipt["unit"] not in done
            done[receipt["unit"]] = receipt["rows"]
    sys.stdout.write(json.dumps([row for unit in sorted(done) for row in done[unit]]))


if __name__ == "__main__":
    main()

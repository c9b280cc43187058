"""A picture that ends or stops the process that decodes it costs its own row and no other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fatal_decoder import HANG, KILL, ONCE
from ray_cluster import ROOT, Cluster, draw_pictures

pytestmark = pytest.mark.ray


def test_only_the_pictures_that_kill_or_hang_their_process_are_set_aside(
    cluster: Cluster, tmp_path: Path
) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 40)
    marks = {3: KILL, 5: KILL, 14: HANG, 30: ONCE + str(tmp_path / "died").encode()}
    for number, mark in marks.items():
        path = pictures / f"picture-{number:03d}.png"
        path.write_bytes(path.read_bytes() + mark)
    driver = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fatal_decoder.py"), pictures, tmp_path / "manifest"],
        env=cluster.env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert driver.returncode == 0, driver.stdout + driver.stderr
    rows = json.loads(driver.stdout.splitlines()[-1])
    assert [row[0] for row in rows] == [f"picture-{number:03d}.png" for number in range(40)]
    failed = {row[0]: (row[1], row[2]) for row in rows if row[1] != "ok"}
    killed = ("crashed", "the process that decoded it ended: SIGKILL")
    assert failed == {
        "picture-003.png": killed,
        "picture-005.png": killed,
        "picture-014.png": ("timed_out", "decoding took more than 2 s"),
    }
    assert (tmp_path / "died").exists()  # it died once, and was decoded by the next process
    assert all(row[3] >= 16 * 16 * 3 for row in rows if row[1] == "ok")

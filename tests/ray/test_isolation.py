"""A picture that ends or stops the process that works on it costs its own row and no other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fatal_work
import pytest
from fatal_decoder import HANG, KILL, ONCE
from PIL import Image
from ray_cluster import ROOT, Cluster, draw_pictures

pytestmark = pytest.mark.ray


def run(driver: str, pictures: Path, cluster: Cluster, folder: Path, *more: str) -> list[list[str]]:
    """Return the rows that a driver prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / driver), pictures, folder / "manifest", *more],
        env=cluster.env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def test_only_the_pictures_that_kill_or_hang_their_process_are_set_aside(
    cluster: Cluster, tmp_path: Path
) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 40)
    marks = {3: KILL, 5: KILL, 14: HANG, 30: ONCE + str(tmp_path / "died").encode()}
    for number, mark in marks.items():
        path = pictures / f"picture-{number:03d}.png"
        path.write_bytes(path.read_bytes() + mark)
    rows = run("fatal_decoder.py", pictures, cluster, tmp_path)
    assert [row[0] for row in rows] == [f"picture-{number:03d}.png" for number in range(40)]
    failed = {row[0]: (row[1], row[2]) for row in rows if row[1] != "ok"}
    killed = ("crashed", "the process that decoded it ended: SIGKILL")
    assert failed == {
        "picture-003.png": killed,
        "picture-005.png": killed,
        "picture-014.png": ("timed_out", "decoding took more than 8 s"),
    }
    assert (tmp_path / "died").exists()  # it died once, and was decoded by the next process
    assert all(row[3] >= 16 * 16 * 3 for row in rows if row[1] == "ok")


KILLED = ("crashed", "the process that computed with it ended: SIGKILL")
FATAL = {
    "picture-003.png": (fatal_work.KILL, *KILLED),
    "picture-006.png": (fatal_work.KILL, *KILLED),
    "picture-013.png": (fatal_work.RAISE, "crashed", "RuntimeError: this one"),
    "picture-035.png": (fatal_work.KILL_LATE, *KILLED),
}
# Noticed only when nothing has happened for long.
HANGS = {"picture-020.png": (fatal_work.HANG, "timed_out", "computing took more than 0.5 s")}


@pytest.mark.parametrize(
    ("fatal", "seconds"),
    [(FATAL, "60"), pytest.param(HANGS, "0.5", marks=pytest.mark.slow)],
    ids=["deaths_and_errors", "hangs"],
)
def test_only_the_pictures_at_which_model_or_crf_die_fail_or_hang_are_set_aside(
    fatal: dict[str, tuple[int, str, str]], seconds: str, cluster: Cluster, tmp_path: Path
) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 40)
    for name, (red, *_) in fatal.items():
        Image.new("RGB", (48, 48), (red, 0, 0)).save(pictures / name)
    rows = run("fatal_work.py", pictures, cluster, tmp_path, seconds)
    assert [row[0] for row in rows] == [f"picture-{number:03d}.png" for number in range(40)]
    failed = {row[0]: tuple(row[1:]) for row in rows if row[1] != "ok"}
    assert failed == {name: (status, detail) for name, (_, status, detail) in fatal.items()}

"""A job whose input grows, whose disk is full, that is not alone, or parts of which die."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray_cluster import ROOT, SEGMENT, Cluster, draw_pictures, stopped

from stego_core.config.load import load_job
from stego_core.config.schema import ChaosJob
from stego_core.masks.verify import row_digests, verify_output

pytestmark = pytest.mark.ray


def command(pictures: Path, model: Path, out: Path, *more: str) -> list[str]:
    where = ["--input", str(pictures), "--model", str(model), "--out", str(out)]
    return ["segment_bucket.py", *where, *SEGMENT, *more]


def test_only_new_and_changed_pictures_are_segmented_and_the_gone_ones_told(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    pictures, out = draw_pictures(tmp_path / "pictures", 20, seed=5), tmp_path / "out"
    job = command(pictures, model, out, "--predict.shard-batches", "2")
    cluster.run(*job)
    before = row_digests(str(out))
    more = draw_pictures(tmp_path / "more", 24, seed=6)
    for number in (3, 20, 21, 22, 23):
        name = f"picture-{number:03d}.png"
        (pictures / name).write_bytes((more / name).read_bytes())
    (pictures / "picture-011.png").unlink()
    said = cluster.run(*job).stderr
    assert "4 images added, 1 changed, 1 gone" in said
    found, after = verify_output(str(out)), row_digests(str(out))
    assert (found.rows, found.statuses, found.is_ordered) == (24, {"ok": 24}, True)
    assert sum(before.get(image) == digest for image, digest in after.items()) == 19
    gone = pq.read_table(out / "gone.parquet")["path"].to_pylist()
    assert gone == ["picture-011.png"]
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [e["new"] for e in events if e["event"] == "segment/done"] == [20, 5]
    assert "nothing to do" in cluster.run(*job).stderr
    check = [sys.executable, "-m", "stego_core.masks.verify", str(out)]
    assert subprocess.run(check, cwd=ROOT, capture_output=True).returncode == 0


def test_a_second_job_on_the_same_output_is_refused_while_the_first_runs(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    pictures, out = draw_pictures(tmp_path / "pictures", 40, seed=7), tmp_path / "out"
    job = command(pictures, model, out)
    first = cluster.start(*job)
    with stopped(first, out):
        second = cluster.run(*job, check=2)
    assert f"another job (process {first.pid} on " in second.stderr
    assert first.wait() == 0
    assert verify_output(str(out)).statuses == {"ok": 40}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    cluster: Cluster, model: Path, small_disk: Path, tmp_path: Path
) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 60, seed=8)
    out = small_disk / "out"
    job = command(pictures, model, out, "--predict.unit-images", "4")
    failed = cluster.run(*job, check=2)
    (line,) = [line for line in failed.stderr.splitlines() if "error" in line]
    assert "No space left on device" in line
    assert "free space there" in line
    assert "Traceback" not in failed.stderr
    for path in out.rglob("*"):
        assert not path.name.endswith(".tmp")
        if path.suffix == ".parquet":
            pq.read_table(path)
    assert not (out / "_SUCCESS").exists()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    cluster.run(*job)
    whole = tmp_path / "whole"
    cluster.run(*command(pictures, model, whole, "--predict.unit-images", "4"))
    assert row_digests(str(out)) == row_digests(str(whole))
    assert verify_output(str(out)).is_ordered


@pytest.mark.slow
def test_a_disk_that_is_full_again_and_again_costs_nothing(
    cluster: Cluster, model: Path, small_disk: Path, tmp_path: Path
) -> None:
    pictures, out, units = draw_pictures(tmp_path / "pictures", 60, seed=8), small_disk / "out", []
    flags = ["--predict.unit-images", "4", "--predict.shard-batches", "3"]
    whole = tmp_path / "whole"
    cluster.run(*command(pictures, model, whole, *flags))
    room, rng = 24_000, random.Random(8)
    for _ in range(60):
        subprocess.run(["mount", "-o", f"remount,size={room}", str(small_disk)], check=True)
        done = cluster.run(*command(pictures, model, out, *flags), check=None)
        if done.returncode == 0:
            break
        assert (done.returncode, "No space left" in done.stderr) == (2, True), done.stderr
        units.append(len(list(out.glob("_units/*/*"))) + len(list(out.glob("masks/*"))))
        room += rng.randrange(4_096, 16_384)
    assert len(units) >= 10
    assert len(set(units)) > 3  # it was full at different moments
    assert row_digests(str(out)) == row_digests(str(whole))
    assert verify_output(str(out)).is_ordered
    for path in (whole / "masks").iterdir():
        assert (out / "masks" / path.name).read_bytes() == path.read_bytes()


def soak(out: Path, *flags: str) -> dict:
    """Run chaos.py with three faults; return its summary."""
    common = ["--images", "24", "--nodes", "2", "--faults.rounds", "1", "--faults.per-round", "3"]
    job = [sys.executable, str(ROOT / "jobs" / "chaos.py"), "--out", str(out), *common, *flags]
    done = subprocess.run(job, capture_output=True, text=True, timeout=900)
    logs = "".join(path.read_text() for path in out.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    record = json.loads((out / "chaos.json").read_text())
    assert record["faults"] > 0
    return record


def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    # An actor for each node: where these took all but half a CPU, no task found a place.
    flags = ["--actors", "2", "--faults.mean-s", "1.5"]
    flags += ["--faults.kinds", "driver", "actor", "task", "node"]
    record = soak(tmp_path / "chaos", *flags)
    again = ["--config", str(tmp_path / "chaos" / "config.resolved.toml")]
    assert load_job(ChaosJob, again, prog="chaos.py").actors == 2
    assert record["rows"] == {
        "expected": 24,
        "found": 24,
        "lost": 0,
        "duplicated": 0,
        "changed": 0,
    }


@pytest.mark.slow
def test_a_short_soak_of_training_changes_no_file(tmp_path: Path) -> None:
    flags = ["--target", "train", "--faults.mean-s", "12", "--faults.kinds", "driver", "actor"]
    record = soak(tmp_path / "chaos", *flags)
    counts = record["files"]
    assert counts["expected"] == counts["found"] > 5
    assert (counts["lost"], counts["duplicated"], counts["changed"]) == (0, 0, 0)

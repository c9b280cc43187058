"""Workers that are ended for memory, by Ray and by the kernel, cost time and no row.

Ray runs in a memory control group of its own, which it takes for the whole machine's: whatever else
runs here can neither end it nor be ended by it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray_cluster import SEGMENT, Cluster, draw_pictures, ray_head

from stego_core.distributed.chaos_cluster import kill_all
from stego_core.masks.verify import row_digests, verify_output

pytestmark = [pytest.mark.ray, pytest.mark.slow]

GROUPS = Path("/sys/fs/cgroup/memory")
LIMIT = 2_500_000_000
SIDE = 20_000  # decoded, 1.2 GB in RGB, of which two copies are made
BOMBS = [f"picture-{number:03d}.png" for number in (2, 9, 17, 23, 38)]
# Own group, own view of the groups, then the command.
CAGE = 'echo $$ > "$0/cgroup.procs" && mount --bind "$0" /sys/fs/cgroup/memory && exec "$@"'


@pytest.fixture
def cage() -> Iterator[Path]:
    group = GROUPS / f"stego-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
    except OSError:
        pytest.skip("needs root and memory control groups of version 1")
    yield group
    for _ in range(100):  # what was killed is gone a moment later
        kill_all({int(pid) for pid in (group / "cgroup.procs").read_text().split()})
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)
    raise AssertionError(f"{group} has processes that can't be ended")


def segment(cluster: Cluster, pictures: Path, model: Path, out: Path) -> Path:
    where = ["--input", str(pictures), "--model", str(model), "--out", str(out)]
    limits = ["--limits.max-pixels", str(SIDE**2), "--actors", "1"]
    cluster.run("segment_bucket.py", *where, *SEGMENT, *limits)
    return out


def kills(group: Path) -> int:
    (line,) = [
        line
        for line in (group / "memory.oom_control").read_text().splitlines()
        if line.startswith("oom_kill ")
    ]
    return int(line.split()[1])


# No word of this file's path, so that -k with it chooses one.
@pytest.mark.parametrize("who", ["monitor", "kernel"])
def test_pictures_that_no_memory_is_enough_for_are_set_aside_and_the_others_are_not(
    who: str, cage: Path, cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 40, seed=9)
    for bomb in BOMBS:
        (pictures / bomb).write_bytes(b"no picture")  # in the same company, without its pixels
    calm = row_digests(str(segment(cluster, pictures, model, tmp_path / "calm")))
    Image.new("RGB", (SIDE, SIDE)).save(pictures / BOMBS[0], compress_level=1)
    for bomb in BOMBS[1:]:
        (pictures / bomb).write_bytes((pictures / BOMBS[0]).read_bytes())
    # By default Ray leaves a twentieth of the memory, which the picture fills between two looks;
    # without its monitor the kernel is asked.
    monitor = {"RAY_memory_monitor_refresh_ms": "50" if who == "monitor" else "0"}
    env = cluster.env | monitor | {"RAY_memory_usage_threshold": "0.8"}
    env.pop("RAY_ADDRESS")
    through = ("unshare", "--mount", "--", "sh", "-c", CAGE, str(cage))
    flags = ["--num-cpus=2", "--object-store-memory=100000000", "--include-dashboard=false"]
    with ray_head(tmp_path, "ray.log", env, *flags, through=through) as address:
        small = replace(cluster, env=env | {"RAY_ADDRESS": address})
        out = segment(small, pictures, model, tmp_path / "out")
        killed = kills(cage)
    found, rows = verify_output(str(out)), row_digests(str(out))
    good = 40 - len(BOMBS)
    assert (found.rows, found.is_ordered, found.statuses["ok"]) == (40, True, good)
    assert sum(rows[image] == digest for image, digest in calm.items()) == good
    failed = pq.read_table(out / "quarantine.parquet").to_pylist()
    assert [Path(row["image_uri"]).name for row in failed] == BOMBS
    # Only where a task died is memory bounded, so that there is "not enough" of it.
    reasons = {(row["reason"], row["detail"]) for row in failed}
    assert reasons == {("too_many_pixels", "not enough memory to decode it")}
    assert killed > 1 if who == "kernel" else killed == 0

"""Mining of several sizes beside what `benchmarks/simulate.py` expects of them.

    python -m benchmarks.mining_sizes --data PILE --fit 200 800 --check 100 400 1600

Each size is a job of its own with the default settings and one actor, on a Ray of its own, so give
it an idle machine. Costs come from the two runs of `--fit`: time from the line through both, memory
from the larger. The others are predicted. Writes benchmarks/results/mining_sizes.json, which
docs/scaling.md shows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, machine
from benchmarks.memory import family, pss_bytes
from benchmarks.simulate import Cluster, Costs, predict, read_costs

_EVERY_S = 1.0  # to look at the memory of a process costs milliseconds of the job


def main() -> None:
    """Measure every size, predict those that were not fitted, and write both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of images")
    parser.add_argument("--fit", type=int, nargs=2, default=[200, 800])
    parser.add_argument("--check", type=int, nargs="*", default=[100, 400, 1600])
    parser.add_argument("--mine", nargs=2, metavar=("IMAGES", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mine is not None:
        mine(options.data, int(options.mine[0]), Path(options.mine[1]))
        return
    if options.fit[0] == options.fit[1]:
        parser.error("--fit takes two sizes that differ")
    facts, data = machine(), options.data
    found = {size: measure(data, size) for size in sorted({*options.fit, *options.check})}
    costs, rate = fitted(*(found[size] for size in sorted(options.fit)))
    sizes = [
        {"fitted": n in options.fit, "measured": one, "predicted": predicted(n, costs, rate)}
        for n, one in found.items()
    ]
    content = {"machine": facts, "costs": asdict(costs), "images_per_s": rate, "sizes": sizes}
    (RESULTS / "mining_sizes.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


def measure(data: Path, size: int) -> dict[str, Any]:
    """Return what mining the first images took: time, memory by role, bytes by place."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.mining_sizes", "--data", str(data)]
        command += ["--mine", str(size), folder]
        env = os.environ | {"RAY_ADDRESS": "local"}
        peaks: Counter[str] = Counter()
        with subprocess.Popen(command, cwd=ROOT, env=env) as process:
            while process.poll() is None:
                now: Counter[str] = Counter()
                for pid in family(process.pid):
                    now[_role(pid)] += pss_bytes(pid)
                peaks = Counter({name: max(peaks[name], now[name]) for name in (*now, *peaks)})
                time.sleep(_EVERY_S)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
        run = Path(folder, "run")
        return found | {
            "images": size,
            "actor_bytes": peaks["actor"],
            "other_bytes": peaks["other"],
            "feature_store_bytes": _size(run.glob("features/*/*.npy")),
            "unit_table_bytes": _size(run.glob("features/*/unit-*.parquet")),
            "neighbor_table_bytes": _size(run.glob("neighbors/*.parquet")),
        }


def _role(pid: int) -> str:
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended since
        return "other"
    return "actor" if title.startswith(b"ray::MapWorker") else "other"


def _size(paths: Any) -> int:
    return sum(path.stat().st_size for path in paths)


def mine(data: Path, size: int, folder: Path) -> None:
    """Mine the first images in this process, and leave what Ray's object store says of it."""
    from stego_core.config.load import load_job
    from stego_core.config.schema import MineJob
    from stego_core.distributed.cluster import connect
    from stego_core.distributed.mine import mine_neighbors
    from stego_core.storage.run import RunDirectory

    run = str(folder / "run")
    flags = ["--data.root", str(data), "--data.limit", str(size), "--out", run]
    job = load_job(MineJob, flags, prog="mining_sizes")
    with connect():
        with _ObjectStore() as store:
            mine_neighbors(job, RunDirectory(run, job="mining_sizes"))
        found = store.found()
    events = [json.loads(line) for line in Path(run, "events.jsonl").read_text().splitlines()]
    done = next(event for event in events if event["event"] == "mine/done")
    if done["images"] != size:
        raise SystemExit(f"{data} has {done['images']} usable images; {size} were asked for")
    (folder / "found.json").write_text(json.dumps({"elapsed_s": done["elapsed_s"], **found}))


class _ObjectStore:
    """Watches Ray's object store from a thread: bytes created in all, most in use at a time."""

    def __init__(self) -> None:
        import ray
        from ray._private import internal_api  # `ray memory --stats-only` prints no totals

        state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
        self._ask = lambda: internal_api.get_memory_info_reply(state).store_stats
        self._error: Exception | None = None
        self._peak, self._created = 0, 0

    def __enter__(self) -> _ObjectStore:
        self._created = self._ask().cumulative_created_bytes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        try:
            while not self._ended.wait(_EVERY_S):
                self._peak = max(self._peak, self._ask().object_store_bytes_used)
        except Exception as error:
            self._error = error

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def found(self) -> dict[str, int]:
        """Return what was seen; raises what kept it from looking."""
        if self._error is not None:
            raise self._error
        created = self._ask().cumulative_created_bytes - self._created
        return {"object_store_bytes": created, "in_flight_bytes": self._peak}


def fitted(few: dict[str, Any], many: dict[str, Any]) -> tuple[Costs, float]:
    """Return the costs of an image and the rate of an actor that two measured sizes give.

    Args:
        few: of `measure`, with `images`.
        many: the same of a larger size.
    """
    per_image = (many["elapsed_s"] - few["elapsed_s"]) / (many["images"] - few["images"])
    costs = replace(
        read_costs(),
        start_s=few["elapsed_s"] - few["images"] * per_image,
        base_bytes=0.0,
        actor_bytes=float(many["actor_bytes"]),
    )
    # Whatever the simulator does not explain of the larger size; pages of the object store count
    # with the processes that map them.
    explained = predicted(many["images"], costs, 1 / per_image)["memory_bytes"]
    base = many["other_bytes"] + many["actor_bytes"] - explained
    return replace(costs, base_bytes=base), 1 / per_image


def predicted(size: int, costs: Costs, rate: float) -> dict[str, Any]:
    """Return the simulator's answer for one actor on an otherwise idle machine."""
    cluster = Cluster(
        images=size, accelerators=1, nodes=1, accelerator_images_per_s=rate, cpus=2, efficiency=1.0
    )
    return asdict(predict(cluster, costs))


if __name__ == "__main__":
    main()

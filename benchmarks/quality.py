"""Cluster quality over seeds, beside k-means on the frozen features of the same runs.

Trains and evaluates once per seed with the jobs' own defaults; features are mined once. The figures
are those of `evaluate.py`: one global matching, K clusters, full images, no flip, no CRF.

    python benchmarks/quality.py --data DATA --clusters 21 --runs FOLDER [--ignore 4 7] [--seeds 3]

DATA has `imgs/{train,val}` and `labels/val`. Writes benchmarks/results/quality-<name of DATA>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("cluster.miou", "cluster.accuracy", "baseline_kmeans.miou", "baseline_kmeans.accuracy")


def job(name: str, *flags: str) -> float:
    """Run a job; return its seconds."""
    started_s = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "jobs" / name), *flags], check=True, timeout=3600)
    return time.perf_counter() - started_s


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--clusters", type=int, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--ignore", type=int, nargs="*", default=[])
    parser.add_argument("--score", type=int, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    arguments, train_flags = parser.parse_known_args()
    run = arguments.runs / arguments.data.name
    data = ["--data.root", str(arguments.data)]
    classes = ["--data.ignore-classes", *map(str, arguments.ignore)] if arguments.ignore else []
    if arguments.score:
        classes += ["--data.score-classes", *map(str, arguments.score)]
    found: dict[str, list[float]] = {key: [] for key in KEYS}
    seconds: list[dict[str, float]] = []
    for seed in range(arguments.seeds):
        train = ["--out", str(run), "--clusters.count", str(arguments.clusters)]
        out = f"{run}-eval-{seed}"
        train_s = job("train.py", *data, *train, "--seed", str(seed), *train_flags)
        evaluate_s = job("evaluate.py", *data, *classes, "--model", str(run), "--out", out)
        seconds.append({"train": round(train_s, 1), "evaluate": round(evaluate_s, 1)})
        metrics = json.loads(Path(out, "metrics.json").read_text())
        for key in KEYS:
            found[key].append(metrics[key])
    result = {
        "data": arguments.data.name,
        "clusters": arguments.clusters,
        "seeds": arguments.seeds,
        "train_flags": train_flags,
        "percent": {
            key: {
                "mean": round(statistics.fmean(values), 2),
                "sd": round(statistics.stdev(values), 2) if len(values) > 1 else None,
                "values": values,
            }
            for key, values in found.items()
        },
        "seconds": seconds,  # the first run mines, the others reuse its features
    }
    path = ROOT / "benchmarks" / "results" / f"quality-{arguments.data.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

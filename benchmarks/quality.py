"""Cluster quality over seeds, beside k-means on the frozen features of the same runs.

Trains and evaluates once per seed with the jobs' own defaults; features are mined once. The figures
are those of `evaluate.py`: one global matching, K clusters, full images, no flip, no CRF.

    python benchmarks/quality.py --data DATA --clusters 21 --runs FOLDER [--ignore 4 7] [--seeds 3]

`--ways` evaluates each model also with flip, at three sizes, and with the CRF. All other flags are
those of `train.py`. DATA has `imgs/{train,val}` and `labels/val`. Writes
benchmarks/results/quality-<name of DATA>.json, or with `--ways` prediction-<name of DATA>.json;
where settings of the training are given, their words follow.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script it is found in a folder below

from benchmarks.common import machine

KEYS = (
    "cluster.miou",
    "cluster.accuracy",
    "linear.miou",
    "linear.accuracy",
    "baseline_kmeans.miou",
    "baseline_kmeans.accuracy",
    # Of the frozen features, where labels were there in training: what clusters are held against.
    "baseline_linear.miou",
    "baseline_linear.accuracy",
)
WAYS = ("", "--flip", "--predict.scales 0.75 1 1.25", "--crf")


def job(name: str, *flags: str) -> float:
    """Run a job; return its seconds."""
    started_s = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "jobs" / name), *flags], check=True, timeout=3600)
    return time.perf_counter() - started_s


def spread(values: list[float]) -> dict[str, Any]:
    """Return mean and standard deviation (none of a single value) beside the values."""
    return {
        "mean": round(statistics.fmean(values), 2),
        "sd": round(statistics.stdev(values), 2) if len(values) > 1 else None,
        "values": values,
    }


def measure(arguments: argparse.Namespace, train_flags: list[str]) -> dict[str, Any]:
    """Train and evaluate each seed in each way; return what is written."""
    run = arguments.runs / arguments.data.name
    data = ["--data.root", str(arguments.data)]
    classes = ["--data.ignore-classes", *map(str, arguments.ignore)] if arguments.ignore else []
    if arguments.score:
        classes += ["--data.score-classes", *map(str, arguments.score)]
    train = [*data, "--out", str(run), "--clusters.count", str(arguments.clusters), *train_flags]
    ways = WAYS if arguments.ways else WAYS[:1]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    train_s: list[float] = []
    evaluate_s: dict[str, list[float]] = {way: [] for way in ways}
    for seed in range(arguments.seeds):
        train_s.append(job("train.py", *train, "--seed", str(seed)))
        for number, way in enumerate(ways):
            out = f"{run}-eval-{seed}" + (f"-{number}" if way else "")
            flags = [*data, *classes, *way.split(), "--model", str(run), "--out", out]
            evaluate_s[way].append(job("evaluate.py", *flags))
            found[way].append(json.loads(Path(out, "metrics.json").read_text()))
    percent = {
        way: {key: spread([one[key] for one in runs]) for key in KEYS if key in runs[0]}
        for way, runs in found.items()
    }
    seconds = {way: [round(value, 1) for value in values] for way, values in evaluate_s.items()}
    return {
        "data": arguments.data.name,
        "clusters": arguments.clusters,
        "seeds": arguments.seeds,
        "train_flags": train_flags,
        "percent": percent if arguments.ways else percent[""],
        # The first training mines, the others reuse its features.
        "train_seconds": [round(value, 1) for value in train_s],
        "evaluate_seconds": seconds if arguments.ways else seconds[""],
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--clusters", type=int, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--ignore", type=int, nargs="*", default=[])
    parser.add_argument("--score", type=int, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", action="store_true")
    arguments, train_flags = parser.parse_known_args()
    facts = machine()
    result = {**measure(arguments, train_flags), "machine": facts}
    kind = "prediction" if arguments.ways else "quality"
    # Other settings than the default's have a file of their own.
    words = re.findall(r"[\w.]+", " ".join(train_flags))
    name = "-".join([kind, arguments.data.name, *words])
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

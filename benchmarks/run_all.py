"""Run every benchmark of docs/performance.md, one process each, and renew its table.

    python -m benchmarks.run_all [--skip schedule] [--only crf knn]

A benchmark that fails or runs too long keeps its older result file, and the exit code is 1. One
that measured nothing keeps it, too; below the table stands which run rows are of. The seconds of
each and of all together go to benchmarks/results/total.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from benchmarks import render
from benchmarks.common import RESULTS, ROOT, parser

_LIMIT_S = 1500  # of one benchmark


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    arguments = parser(__doc__)
    arguments.add_argument("--only", nargs="+", choices=render.BENCHMARKS, default=None)
    arguments.add_argument("--skip", nargs="+", choices=render.BENCHMARKS, default=[])
    found = arguments.parse_args()
    shared = ["--images", found.images, "--model", found.model, "--repeats", str(found.repeats)]
    shared += ["--run", found.run]
    if found.data:
        shared += ["--data", found.data]
    failed = []
    took_s: dict[str, float] = {}
    for name in found.only or render.BENCHMARKS:
        if name in found.skip or not (ROOT / "benchmarks" / f"{name}.py").exists():
            continue
        print(f"== {name}", flush=True)
        started_s = time.perf_counter()
        command = [sys.executable, "-m", f"benchmarks.{name}", *shared]
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=_LIMIT_S, check=False).returncode
        except subprocess.TimeoutExpired:
            code = 1
            print(f"{name} was ended after {_LIMIT_S} s")
        took_s[name] = time.perf_counter() - started_s
        print(f"== {name}: {took_s[name]:.0f} s", flush=True)
        if code:
            failed.append(name)
    render.main()
    skipped = [name for name in render.BENCHMARKS if name not in took_s]
    write_total(found.run, took_s, failed=failed, skipped=skipped)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def write_total(
    run: str, took_s: dict[str, float], *, failed: list[str], skipped: list[str]
) -> None:
    """Print the seconds of the whole run, and write them beside the results."""
    total_s = sum(took_s.values())
    print(f"== all: {total_s:.0f} s", flush=True)
    content = {
        "run": run,
        "seconds": round(total_s, 1),
        "benchmarks": {name: round(one_s, 1) for name, one_s in took_s.items()},
        "failed": failed,
        "skipped": skipped,
    }
    (RESULTS / "total.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())

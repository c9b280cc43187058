"""Run every benchmark of docs/performance.md, one process each, and renew its table.

    python -m benchmarks.run_all [--skip schedule] [--only crf knn]

A benchmark that fails or runs too long keeps its older result file, and the exit code is 1. One
that measured nothing keeps it, too; below the table stands which run rows are of.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks import render
from benchmarks.common import ROOT, parser

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
        print(f"== {name}: {time.perf_counter() - started_s:.0f} s", flush=True)
        if code:
            failed.append(name)
    render.main()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Mining, 5000 batches of training and evaluation, beside the original's schedule of 5000 steps.

The original computes its backbone twice in every step: 11.2 s at batch 16, ViT-S/8, 224 pixels, on
two cores (its own modules, measured once, on another machine of that size); 5000 of them are its
schedule without mining and evaluation. Ours are the two jobs as a user runs them, from nothing to
`metrics.json`, start of Python and Ray included. Needs `--data` with `imgs/` and `labels/`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.common import ROOT, Options, Row, run, seconds

_STEPS, _ORIGINAL_STEP_S = 5000, 11.2


def job_seconds(name: str, *flags: str) -> float:
    """Run a job; return its seconds."""
    command = [sys.executable, str(ROOT / "jobs" / name), *flags]
    return seconds(lambda: subprocess.run(command, check=True, timeout=3600))


def measure(options: Options) -> list[Row]:
    """Return the rows: the ratio, and the minutes; nothing without labelled data."""
    if options.data is None:
        print("schedule: no --data, nothing to measure")
        return []
    with tempfile.TemporaryDirectory() as folder:
        run_flags = ["--data.root", options.data, "--out", f"{folder}/run"]
        run_flags += ["--clusters.count", "27"]  # the original's
        train_s = job_seconds("train.py", *run_flags, "--train.steps", str(_STEPS))
        evaluate = ["--data.root", options.data, "--model", f"{folder}/run"]
        evaluate_s = job_seconds("evaluate.py", *evaluate, "--out", f"{folder}/eval")
    total_s = train_s + evaluate_s
    what = f"mine + train {_STEPS} batches + evaluate"
    facts = {"train_s": round(train_s, 1), "evaluate_s": round(evaluate_s, 1)}
    projected = f"the original's schedule, {_STEPS} x {_ORIGINAL_STEP_S} s"
    shared: dict[str, Any] = {"facts": facts, "needs_data": True}
    ratio = _STEPS * _ORIGINAL_STEP_S / total_s
    return [
        Row(what, projected, 60, [ratio], **shared),
        Row(what, "the clock", 15, [total_s / 60], direction="at most", unit="min", **shared),
    ]


if __name__ == "__main__":
    run("schedule", __doc__, measure)

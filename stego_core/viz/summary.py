"""The demo's last words: what was made, where it lies, and one line that queries it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from stego_core.storage import fs
from stego_core.storage.run import RunDirectory
from stego_core.viz.build import query_line


def describe(run_uri: str, masks_uri: str) -> str:
    """Return what a training run and a segmentation made, a line each.

    Args:
        run_uri: run directory of train.py.
        masks_uri: output of segment_bucket.py.
    """
    success = RunDirectory(masks_uri, job="summary").read_json("_SUCCESS") or {}
    statuses = ", ".join(f"{k} {v}" for k, v in sorted(success.get("statuses", {}).items()))
    parts = len(fs.list_names(fs.join(masks_uri, "masks")))
    return "\n".join(
        [
            "",
            f"model       {run_uri}/model/model.safetensors",
            f"masks       {masks_uri}/masks/*.parquet  ({parts} file(s); {statuses})",
            f"quarantine  {masks_uri}/quarantine.parquet",
            f"report      {masks_uri}/report/index.html  (open it in a browser)",
            "",
            "Which images show most of one cluster?",
            f"  {query_line(masks_uri, python=_this_python())}",
            "",
        ]
    )


def _this_python() -> str:
    """Return this interpreter as a shell of this folder names it."""
    return shlex.quote(sys.executable.removeprefix(f"{Path.cwd()}/"))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the description of two directories named on the command line."""
    run_uri, masks_uri = sys.argv[1:] if argv is None else argv
    sys.stdout.write(describe(run_uri, masks_uri))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What all tests share: import paths, caps on threads, and the one cluster of `ray_cluster`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

# A busy machine may take long for any example, and all runs of CI should see the same ones.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

# Two cores are all that CI has; results must not depend on the number of threads either.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Else each worker of each job compiles the package for itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Here and nowhere else: a fixture that two folders import is two fixtures, and two clusters.
from google_store import google_store  # noqa: E402 - found by the path above
from ray_cluster import cluster, data, model  # noqa: E402 - found by the path above
from s3_store import s3_cluster, store  # noqa: E402 - found by the path above

__all__ = ["cluster", "data", "google_store", "model", "s3_cluster", "store"]

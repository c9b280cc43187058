"""On a machine of few CPUs results are finished while others are computed, not at the end."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from ray_cluster import ROOT, Cluster

pytestmark = pytest.mark.ray


def test_units_are_finished_while_others_are_computed(cluster: Cluster) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "small_cluster.py")],
        env=cluster.env | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # What is computed is lost in a kill until it is finished, which is when masks are written.
    assert json.loads(done.stdout.splitlines()[-1]) == [], "nothing finished while all was read"

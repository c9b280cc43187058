"""A soak from bucket to bucket: drivers, nodes and heads die, and no row of the bucket is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray_cluster import ROOT, draw_pictures
from s3_store import BUCKET, KEY_ID, SECRET, Store, needs_server

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.s3, needs_server]

OUT = f"s3://{BUCKET}/soak"
# With this seed a head is the first to die, while the job is at work: a cluster that is started
# anew must know the bucket, too.
FAULTS = ["--seed", "20", "--faults.rounds", "1", "--faults.per-round", "3"]
FAULTS += ["--faults.mean-s", "5", "--faults.kinds", "driver", "node", "head"]


def test_a_short_soak_from_bucket_to_bucket_loses_nothing(store: Store, tmp_path: Path) -> None:
    for picture in sorted(draw_pictures(tmp_path / "pictures", 24, seed=9).iterdir()):
        store.client.upload_file(str(picture), BUCKET, f"soak-input/{picture.name}")
    job = [sys.executable, str(ROOT / "jobs" / "chaos.py"), "--nodes", "2", *FAULTS]
    job += ["--input", f"s3://{BUCKET}/soak-input", "--out", OUT]
    # Credentials come from the environment alone, which drivers, nodes and heads inherit.
    env = os.environ | store.where | store.credentials
    done = subprocess.run(
        job, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=580, check=False
    )
    keys = store.keys("soak/")
    logs = "".join(store.read(key).decode() for key in keys if key.endswith(".log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    record = json.loads(store.read("soak/chaos.json"))
    assert record["faults_by_kind"]["head"] > 0
    counts = {"expected": 24, "found": 24, "lost": 0, "duplicated": 0, "changed": 0}
    assert record["rows"] == counts
    status = json.loads(store.read("soak/status.json"))
    assert (status["state"], status["exit_code"]) == ("done", 0)
    assert {"soak/round-000/_SUCCESS", "soak/round-000.toml", "soak/round-000.log"} <= set(keys)
    assert {path.name for path in tmp_path.iterdir()} == {"pictures"}
    for secret in (KEY_ID, SECRET):
        assert secret not in done.stdout + done.stderr + logs

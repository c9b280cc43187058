"""Training without a feature store: the backbone streams, and nothing else changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ray_cluster import ROOT, TRAIN, Cluster
from safetensors.numpy import load_file

pytestmark = pytest.mark.ray
STREAMED = [*TRAIN, "--store.max-bytes", "0"]


@pytest.fixture(scope="module")
def found(cluster: Cluster, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the driver found on the cluster, from the features and images of `model`."""
    script, folder = str(ROOT / "tests" / "stream_driver.py"), tmp_path_factory.mktemp("stream")
    driver = subprocess.run(
        [sys.executable, script, model, folder],
        env=cluster.env | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert driver.returncode == 0, driver.stdout + driver.stderr
    return json.loads(driver.stdout.splitlines()[-1])


def test_streamed_reads_are_those_of_the_store_to_the_last_bit(found: dict) -> None:
    assert len(found["reads"]["equal"]) == 61
    assert all(found["reads"]["equal"])
    assert found["reads"]["layout"]
    assert "is not the one that was expected" in found["wrong"]


def test_no_more_is_computed_ahead_than_the_plan_says(found: dict) -> None:
    assert 0 < found["reads"]["ahead"] <= found["reads"]["bound"]


def test_a_streamed_training_is_the_stored_one_also_when_it_is_resumed(found: dict) -> None:
    assert found["whole"]
    assert found["resumed"]
    assert found["first"] == 5


def test_processes_that_die_and_stages_that_fail_are_begun_again(found: dict) -> None:
    assert found["faults"] == [True, True]


def test_a_stream_leaves_no_actor_behind(found: dict) -> None:
    assert found["free"]


@pytest.mark.slow
def test_a_job_past_the_budget_gives_the_model_of_one_with_a_store(
    cluster: Cluster, data: Path, model: Path, tmp_path: Path
) -> None:
    cluster.run("train.py", "--data.root", str(data), "--out", str(tmp_path), *STREAMED)
    assert not list(tmp_path.glob("features/*/*.npy"))
    stored, streamed = (load_file(r / "model" / "model.safetensors") for r in (model, tmp_path))
    assert stored.keys() == streamed.keys()
    assert all((stored[key] == streamed[key]).all() for key in stored)


def test_two_workers_stream_their_own_shares(
    cluster: Cluster, data: Path, model: Path, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path), "--workers", "2"]
    cluster.run("train.py", "--data.root", str(data), *out, *STREAMED)
    one, two = (load_file(r / "model" / "model.safetensors") for r in (model, tmp_path))
    for key in one:
        if key.startswith("head."):
            # Sums over workers are added in another order: float32 rounding over 30 Adam steps.
            assert abs(one[key] - two[key]).max() < 2e-4, key

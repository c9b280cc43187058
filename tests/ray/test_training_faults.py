"""Trainings whose processes and nodes are killed, and that go on with another number of workers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray_cluster import ROOT, TRAIN, Cluster, kill_when
from safetensors.numpy import load_file

from stego_core.distributed.chaos_cluster import LocalCluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# As in test_pipeline.py: float32 rounding of sums in another order, over some Adam steps.
TOLERANCE = 2e-4
SETTINGS = [*TRAIN, "--train.steps", "60", "--train.log-every", "1"]


def events(run: Path, name: str) -> list[dict]:
    path = run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in found if event["event"] == name]


def batches(run: Path) -> dict[int, str]:
    """Return the hash of each step's batch; a step that was done again has the same one."""
    found: dict[int, str] = {}
    for event in events(run, "train/step"):
        assert found.setdefault(event["step"], event["batch"]) == event["batch"]
    return found


def largest_difference(one: Path, two: Path) -> float:
    first, second = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    heads = [key for key in first if key.startswith("head.")]
    assert first.keys() == second.keys()
    return max(float(abs(first[key] - second[key]).max()) for key in heads)


@pytest.fixture(scope="module")
def calm(cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calm") / "run"
    cluster.run("train.py", "--data.root", str(data), "--out", str(out), *SETTINGS)
    return out


def test_two_one_and_two_workers_after_kills_see_the_batches_of_an_undisturbed_run(
    cluster: Cluster, data: Path, calm: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = ["train.py", "--data.root", str(data), "--out", str(out), *SETTINGS]
    for workers, starts in (("2", 0), ("1", 1)):
        process = cluster.start(*job, "--workers", workers)
        pattern = f"checkpoints/*/start-{starts:03d}/step-*/state.json"
        kill_when(process, lambda: list(out.glob(pattern)))  # noqa: B023 - called in this turn
    cluster.run(*job, "--workers", "2")
    resumed = [event["workers"] for event in events(out, "train/resumed")]
    assert resumed == [1, 2]
    assert batches(out) == batches(calm)
    assert largest_difference(calm, out) < TOLERANCE


def wait_for(is_time: Callable[[], object], job: subprocess.Popen) -> None:
    deadline_s = time.monotonic() + 150
    while not is_time():
        assert job.poll() is None, "the job ended too early"
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_a_training_gives_up_a_worker_with_its_node_and_takes_one_back(
    data: Path, calm: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    # Long enough for Ray to look for more room, once a minute.
    flags = ["--workers", "2", "--min-workers", "1", "--train.steps", "30000"]
    flags += ["--train.checkpoint-every", "100"]
    job = [sys.executable, str(ROOT / "jobs" / "train.py"), "--data.root", str(data)]
    nodes = LocalCluster(nodes=2, num_cpus=3)  # room for one worker each
    try:
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                [*job, "--out", str(out), *SETTINGS, *flags],
                env=nodes.environment(),
                stdout=log,
                stderr=log,
            )
        wait_for(lambda: list(out.glob("checkpoints/*/*/step-*/state.json")), process)
        nodes.lose(0)
        wait_for(lambda: [e["workers"] for e in events(out, "train/resumed")] == [1], process)
        nodes.add()
        wait_for(lambda: [e["workers"] for e in events(out, "train/resumed")] == [1, 2], process)
        process.kill()
        process.wait()
    finally:
        nodes.close()
    steps = batches(out)
    common = steps.keys() & batches(calm).keys()
    assert {step: steps[step] for step in common} == batches(calm)
    # Nothing was left out between the first step and the last.
    assert sorted(steps) == list(range(1, max(steps) + 1))

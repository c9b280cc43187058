"""Processes of Ray that wait for the next unit are there when it comes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ray_cluster import ROOT, Cluster

pytestmark = pytest.mark.ray

# Ray ends idle processes while a node has more processes than CPUs, and actors count.
DRIVER = """
import os, time
import ray
from stego_core.distributed.cluster import connect

TASKS = 3

class Meeting:
    def __init__(self):
        self._came = 0

    def come(self):
        self._came += 1

    def came(self):
        return self._came

def work(meeting, number):
    # All tasks at a time, so that none takes the process of another.
    ray.get(meeting.come.remote())
    while ray.get(meeting.came.remote()) < TASKS * number:
        time.sleep(0.1)
    return os.getpid()

with connect():
    cpus = int(ray.cluster_resources()["CPU"])
    meeting = ray.remote(num_cpus=0)(Meeting).remote()
    others = [ray.remote(num_cpus=0)(Meeting).remote() for _ in range(cpus)]
    ray.get([other.came.remote() for other in others])
    rounds = []
    for number in (1, 2, 3):
        task = ray.remote(num_cpus=0.5)(work)
        rounds.append(set(ray.get([task.remote(meeting, number) for _ in range(TASKS)])))
        time.sleep(3)
    print(rounds[0] == rounds[1] == rounds[2])
"""


def test_processes_without_work_are_kept_beside_actors(cluster: Cluster) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        env=cluster.env | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "True"

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

def work(meeting):
    # All tasks at a time, so that none takes the process of another.
    ray.get(meeting.come.remote())
    while ray.get(meeting.came.remote()) < TASKS:
        time.sleep(0.1)
    return os.getpid()

def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

with connect():
    cpus = int(ray.cluster_resources()["CPU"])
    meeting = ray.remote(num_cpus=0)(Meeting).remote()
    others = [ray.remote(num_cpus=0)(Meeting).remote() for _ in range(cpus)]
    ray.get([other.came.remote() for other in others])
    task = ray.remote(num_cpus=0.3)(work)
    pids = set(ray.get([task.remote(meeting) for _ in range(TASKS)]))
    time.sleep(6)
    print(len(pids), all(is_alive(pid) for pid in pids))
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
    assert done.stdout.splitlines()[-1] == "3 True"

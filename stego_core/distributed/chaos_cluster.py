"""What a soak can kill: a cluster of its own on this machine, or the one of the environment."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stego_core.distributed.cluster import connect
from stego_core.errors import ClusterError

# What Ray calls the processes of `run_units` and of a training; actors and tasks of Ray's own are
# not among them.
_ACTORS = ("ray::MapWorker(", "ray::DeathLedger", "ray::RayTrainWorker")
_TASKS = ("ray::MapBatches(",)


class Victims(Protocol):
    """A cluster with a way to kill parts of it."""

    def environment(self) -> dict[str, str]:
        """Return the environment of a driver on this cluster."""

    def kill(self, kind: str, rng: random.Random) -> bool:
        """Kill an actor, task, node or the head; tell whether there was one."""

    def close(self) -> None:
        """End what was started."""


def processes() -> dict[int, tuple[int, str]]:
    """Return parent and command line of every process of this machine, by process id."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = (folder / "stat").read_text()
                parent = int(stat.rpartition(")")[2].split()[1])
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = (parent, line.decode(errors="replace").strip())
    return found


def descendants(pids: set[int]) -> set[int]:
    """Return the processes with all below them."""
    family, table = set(pids), processes()
    while grown := {pid for pid, (parent, _) in table.items() if parent in family} - family:
        family |= grown
    return family


def kill_all(pids: set[int]) -> bool:
    """Kill the processes; tell whether any was there."""
    is_any = False
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            is_any = True
    return is_any


def victims_of(kind: str, pids: set[int]) -> list[int]:
    """Return those of the processes that run the model (`actor`), or read or write (`task`)."""
    names = _ACTORS if kind == "actor" else _TASKS
    table = processes()
    return sorted(pid for pid in pids if pid in table and table[pid][1].startswith(names))


class LocalCluster:
    """A head and some nodes on this machine, in a folder of their own.

    Args:
        nodes: worker nodes.
        num_cpus: of each.
    """

    def __init__(self, *, nodes: int, num_cpus: int) -> None:
        self._num_nodes, self._num_cpus = nodes, num_cpus
        self._start()

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="chaos-")  # short: Unix sockets lie below it
        self._env = os.environ | {
            "RAY_TMPDIR": self._folder,
            "RAY_AUTH_MODE": "disabled",  # loopback only, and nobody else's
            "RAY_USAGE_STATS_ENABLED": "0",
            # A dead node is noticed in seconds rather than in half a minute.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
        }
        self._env.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "stego_core.distributed.chaos_host"]
        self._host = subprocess.Popen(  # noqa: S603 - our own module
            command,
            env=self._env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._nodes: list[set[int]] = []
        try:
            self._address = str(self._read()["address"])
            for _ in range(self._num_nodes):
                self.add()
        except BaseException:  # nobody else has a handle of what did start
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        assert self._host.stdout is not None  # noqa: S101 - it was opened as a pipe
        # Ray prints notes of its own to the same stream.
        for line in self._host.stdout:
            if line.startswith('{"address"'):
                return dict(json.loads(line))
        raise ClusterError("the local cluster did not start; see the logs below /tmp/chaos-*")

    def add(self) -> None:
        """Start one more node."""
        assert self._host.stdin is not None  # noqa: S101 - it was opened as a pipe
        self._host.stdin.write(f"{self._num_cpus}\n")
        self._host.stdin.flush()
        self._nodes.append(set(self._read()["pids"]))

    def lose(self, number: int) -> bool:
        """Kill all processes of a node; tell whether there were any."""
        return kill_all(descendants(self._nodes.pop(number)))

    def environment(self) -> dict[str, str]:
        """Return the environment of a driver on this cluster."""
        return self._env | {"RAY_ADDRESS": self._address}

    def kill(self, kind: str, rng: random.Random) -> bool:
        """Kill an actor, task, node or the head; a node or head that was killed is replaced."""
        if kind == "head":
            self.close()
            self._start()
            return True
        if kind == "node":
            is_killed = self.lose(rng.randrange(len(self._nodes)))
            self.add()
            return is_killed
        found = victims_of(kind, descendants({self._host.pid}))
        return bool(found) and kill_all({rng.choice(found)})

    def close(self) -> None:
        """Kill the whole cluster at once, and delete its folder."""
        kill_all(descendants({self._host.pid}))
        self._host.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def kill_here(kind: str, seed: int) -> bool:
    """Kill on the node where this runs: all of it, or one of its workers.

    What is not below this node's raylet is spared: the machine may have other nodes.
    """
    family = descendants({os.getppid()})
    if kind == "node":
        return kill_all(family - {os.getpid()}) and kill_all({os.getpid()})
    found = victims_of(kind, family)
    return bool(found) and kill_all({random.Random(seed).choice(found)})


class GivenCluster:
    """The cluster of the environment; its nodes must be replaced by whoever runs it.

    Victims are picked among all that runs there, other jobs of this package included.
    """

    def environment(self) -> dict[str, str]:
        """Return the environment of a driver on this cluster."""
        return dict(os.environ)

    def kill(self, kind: str, rng: random.Random) -> bool:
        """Kill an actor, a task or a node other than the head; the head is never killed."""
        with connect():
            nodes = [node for node in ray.nodes() if node["Alive"]]
            if kind == "node":
                own = ray.get_runtime_context().get_node_id()
                nodes = [n for n in nodes if "node:__internal_head__" not in n["Resources"]]
                nodes = [n for n in nodes if n["NodeID"] != own]
            rng.shuffle(nodes)
            return kind != "head" and any(self._kill_on(node, kind, rng) for node in nodes)

    def _kill_on(self, node: dict[str, Any], kind: str, rng: random.Random) -> bool:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = (
            ray.remote(kill_here)
            .options(num_cpus=0, max_retries=0, scheduling_strategy=where)
            .remote(kind, rng.getrandbits(32))
        )
        try:
            return bool(ray.get(task))
        except ray.exceptions.RayError:
            return kind == "node"  # the task dies with its node

    def close(self) -> None:
        """Leave the cluster as it is."""

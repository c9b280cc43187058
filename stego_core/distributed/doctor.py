"""The doctor: the checks of `stego_core.doctor`, those of Ray, and what is printed of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial

from stego_core.config.doctor import DoctorJob
from stego_core.datasets.demo import DEMO
from stego_core.distributed.doctor_ray import check_auth, check_cluster, check_ray
from stego_core.doctor import machine, parts, stores
from stego_core.doctor.findings import Check, Finding, State, conclude, examine
from stego_core.errors import EXIT_OK
from stego_core.log import redact
from stego_core.storage import fs


def checks_of(job: DoctorJob) -> list[tuple[str, Check]]:
    """Return the checks in the order in which they are made, each with its name."""
    memory = machine.available_memory()
    found: list[tuple[str, Check]] = [
        ("python", machine.check_python),
        ("packages", machine.check_packages),
        ("torch", machine.check_torch),
        ("cpus", machine.check_cpus),
        ("memory", partial(machine.check_memory, memory)),
        ("disk", partial(machine.check_disk, machine.ray_folder())),
        ("shm", partial(machine.check_shared_memory, memory=memory)),
        *((name, partial(parts.check_extra, name)) for name in parts.EXTRAS),
        ("weights", partial(parts.check_weights, job.backbone)),
    ]
    uris = [uri for uri in (job.input, job.out) if uri is not None]
    found.append(("clock", partial(stores.check_clock, uris)))
    if job.input is not None and job.input != DEMO:
        found.append(("input", partial(stores.check_input, job.input)))
    if job.out is not None:
        found.append(("out", partial(stores.check_out, job.out)))
        if fs.is_local(job.out):
            found.append(("disk", partial(machine.check_disk, machine.existing(job.out))))
    return [
        *found,
        ("ray", check_ray),
        ("auth", check_auth),
        ("cluster", partial(check_cluster, job)),
    ]


def plan_doctor(job: DoctorJob) -> list[str]:
    """Name the checks; make none."""
    names = ", ".join(dict.fromkeys(name for name, _ in checks_of(job)))
    places = [f"{name} {uri}" for name, uri in (("read", job.input), ("write", job.out)) if uri]
    return [f"checks: {names}", f"stores: {'; '.join(places) or 'none given'}"]


def diagnose(job: DoctorJob, write: Callable[[str], object] | None = None) -> None:
    """Make all checks, with a line for each as soon as it is known.

    Args:
        job: what to look at.
        write: takes the lines; standard output without it.

    Raises:
        ConfigError, InputError, ClusterError: if a check failed; all were made and told before.
    """
    write = write or sys.stdout.write
    findings = []
    for finding in examine(checks_of(job)):
        write(f"{finding.line()}\n")
        sys.stdout.flush()
        findings.append(finding)
    if job.json is not None:
        fs.write_bytes(job.json, redact(_as_json(findings)).encode())
    conclude(findings)


def _as_json(findings: list[Finding]) -> str:
    failed = [finding.exit_code for finding in findings if finding.state is State.FAIL]
    states = {finding.state for finding in findings}
    worst = next((state for state in (State.FAIL, State.WARN) if state in states), State.OK)
    record = {
        "version": 1,
        "state": worst.value,
        "exit_code": failed[0] if failed else EXIT_OK,
        "findings": [finding.record() for finding in findings],
    }
    return json.dumps(record, indent=2) + "\n"

#!/usr/bin/env python3
"""Fail if an advisory is known for a pinned package: constraints.txt and constraints-all.txt.

Where no advisories are to be had (no internet, or an index that serves packages alone) it says so
and passes. An index without them answers as if there were none, so a version with advisories that
will never be withdrawn is asked for first. Run by `make audit`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CANARY = "pillow==9.0.0"  # CVE-2023-4863 and others
_SECONDS = 300.0  # for some 150 packages, one request each


def advisories(report: dict[str, Any]) -> list[str]:
    """Return one line for each advisory of a report of pip-audit."""
    return [
        f"{package['name']} {package['version']}: {found['id']}"
        + (f", repaired in {', '.join(found['fix_versions'])}" if found["fix_versions"] else "")
        for package in report["dependencies"]
        for found in package.get("vulns", [])
    ]


def unknown(report: dict[str, Any]) -> list[str]:
    """Return the packages of a report of which nothing is known."""
    return [package["name"] for package in report["dependencies"] if "skip_reason" in package]


def pinned(*files: Path) -> str:
    """Return the lines of constraints files that pin a package."""
    lines = [line for file in files for line in file.read_text().splitlines()]
    return "\n".join(line for line in lines if "==" in line and not line.startswith("#"))


def ask(requirements: str) -> dict[str, Any] | str:
    """Return what pip-audit reports of pinned packages, or the last line of what went wrong."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements + "\n")
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--format", "json", "--no-deps"]
        command += ["--disable-pip", "--progress-spinner", "off", "-r", file.name]
        try:
            ran = subprocess.run(  # noqa: S603 - the command is written above
                command, capture_output=True, text=True, timeout=_SECONDS
            )
            report: dict[str, Any] = json.loads(ran.stdout)
        except subprocess.TimeoutExpired as error:
            return str(error)
        except json.JSONDecodeError:
            return (ran.stderr.strip().splitlines() or ["no report"])[-1]
    return report


def main() -> int:
    """Print what is known; return 1 if it is anything."""
    canary = ask(CANARY)
    if isinstance(canary, str) or not advisories(canary):
        sys.stdout.write("no advisories are to be had from here: nothing was audited\n")
        return 0
    report = ask(pinned(ROOT / "constraints.txt", ROOT / "constraints-all.txt"))
    if isinstance(report, str):  # although there are advisories: it may be our own mistake
        sys.stdout.write(f"pip-audit failed: {report}\n")
        return 1
    found, missing = advisories(report), unknown(report)
    sys.stdout.write("".join(f"{line}\n" for line in found))
    audited = len(report["dependencies"]) - len(missing)
    sys.stdout.write(f"{audited} packages audited, {len(found)} advisories")
    sys.stdout.write(f"; nothing is known of {', '.join(missing)}\n" if missing else "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

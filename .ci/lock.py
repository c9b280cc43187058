#!/usr/bin/env python3
"""Pin what the named packages need in turn, as it is installed here: constraints-all.txt.

`constraints.txt` is written by hand and names what the project names; this file has the rest, so
that CI installs the same on every day. Run by `make lock` after a change of constraints.txt.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = {"cpu", "google", "dev", "test", "crf", "report", "demo", "fuzz"}
HEADER = "# Made by `make lock`: what the packages of constraints.txt need in turn.\n"


def named_by_project() -> list[str]:
    """Return the requirements of pyproject.toml, those of the extras of `EXTRAS` included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra, more in project["optional-dependencies"].items():
        if extra in EXTRAS:
            lines += [line for line in more if not line.startswith(project["name"])]
    return lines


def closure(lines: list[str]) -> dict[str, str]:
    """Return name → version of all that these requirements need, as far as it is installed."""
    found: dict[str, str] = {}
    asked: set[tuple[str, frozenset[str]]] = set()
    pending = [(Requirement(line), frozenset[str]()) for line in lines]
    while pending:
        required, extras = pending.pop()
        environments = [{"extra": extra} for extra in (*extras, "")]
        marker = required.marker
        if marker is not None and not any(marker.evaluate(one) for one in environments):
            continue
        name = canonicalize_name(required.name)
        key = (name, frozenset(required.extras))
        if key in asked:
            continue
        asked.add(key)
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        pending += [(Requirement(line), key[1]) for line in metadata.requires(name) or []]
    return found


def pinned(path: Path) -> set[str]:
    """Return the names that a constraints file pins."""
    return {canonicalize_name(n) for n in re.findall(r"^([\w.-]+)==", path.read_text(), re.M)}


def main() -> int:
    """Write the file."""
    named = pinned(ROOT / "constraints.txt")
    rest = {n: v for n, v in closure(named_by_project()).items() if n not in named}
    lines = [f"{name}=={version.partition('+')[0]}\n" for name, version in sorted(rest.items())]
    (ROOT / "constraints-all.txt").write_text(HEADER + "".join(lines))
    sys.stdout.write(f"{len(lines)} packages beside the {len(named)} of constraints.txt\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

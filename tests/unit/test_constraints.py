"""What is installed for tests is pinned, so that CI runs with the same packages on every day."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("lock", ROOT / ".ci" / "lock.py")
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)

FILES = (ROOT / "constraints.txt", ROOT / "constraints-all.txt")


def test_everything_that_the_project_needs_is_pinned():
    pinned = lock.pinned(FILES[0]) | lock.pinned(FILES[1])
    needed = lock.closure(lock.named_by_project())
    assert len(needed) > 80
    assert sorted(needed.keys() - pinned) == [], "run: make lock"


def test_a_package_of_a_package_is_followed():
    needed = lock.closure(["boto3"])
    assert {"boto3", "botocore", "urllib3"} <= needed.keys()
    assert "pytest" not in needed
    assert "py-spy" in lock.closure(["ray[default]"])  # only of the extra
    assert "py-spy" not in lock.closure(["ray"])


def test_no_line_names_a_place_or_a_host():
    for path in FILES:
        for line in path.read_text().splitlines():
            assert line.startswith("#") or line.count("==") == 1, line
            assert "://" not in line
            assert " @ " not in line

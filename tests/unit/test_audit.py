"""What CI makes of pip-audit's reports: an advisory fails, silence is no all-clear."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

HARMFUL = {
    "name": "pillow",
    "version": "9.0.0",
    "vulns": [{"id": "CVE-2022-24303", "fix_versions": ["9.0.1"], "description": "..."}],
}
CLEAN = {"name": "numpy", "version": "2.4.0", "vulns": []}
SILENT = {"name": "ray", "skip_reason": "could not be audited"}


@pytest.fixture
def answers(monkeypatch):
    """Reports that pip-audit gives one after the other; a text is what it prints instead."""
    given, asked = [], []

    def run(command, **_):
        asked.append(Path(command[-1]).read_text())
        report = given.pop(0)
        if isinstance(report, Exception):
            raise report
        text = report if isinstance(report, str) else json.dumps({"dependencies": report})
        return subprocess.CompletedProcess(command, 0, text, "a\nplanted\n")

    monkeypatch.setattr(audit.subprocess, "run", run)
    return given, asked


@pytest.mark.parametrize(
    ("second", "code", "text"),
    [
        ([CLEAN, SILENT], 0, "1 packages audited, 0 advisories; nothing is known of ray\n"),
        (
            [CLEAN, HARMFUL],
            1,
            "pillow 9.0.0: CVE-2022-24303, repaired in 9.0.1\n2 packages audited, 1 advisories\n",
        ),
        ("", 1, "pip-audit failed: planted\n"),
    ],
)
def test_an_advisory_of_a_pinned_package_fails(second, code, text, answers, capsys):
    given, asked = answers
    given += [[HARMFUL], second]
    assert audit.main() == code
    assert capsys.readouterr().out == text
    assert asked[0] == "pillow==9.0.0\n"
    assert {"torch", "ray", "botocore"} <= {line.split("==")[0] for line in asked[1].split()}


@pytest.mark.parametrize(
    "first",
    [
        [{"name": "pillow", "skip_reason": "not found"}],  # an index of packages alone
        [CLEAN],  # one that answers as if there were no advisories at all
        "Traceback (most recent call last):",  # no network
        subprocess.TimeoutExpired("pip_audit", 1),
    ],
)
def test_where_a_known_advisory_is_not_told_nothing_is_audited(first, answers, capsys):
    given, _ = answers
    given.append(first)
    assert audit.main() == 0
    assert capsys.readouterr().out == "no advisories are to be had from here: nothing was audited\n"

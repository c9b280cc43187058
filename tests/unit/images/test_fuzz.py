"""The fuzz run finds what is there to find, and counts what it fed. `make fuzz` is the long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "fuzz" / "run.py"
pytest.importorskip("atheris", reason="the extra `fuzz` is not installed")


def fuzz(out: Path, *flags: str, **env: str) -> tuple[int, dict]:
    command = [sys.executable, str(RUN), "--out", str(out), *flags]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    return done.returncode, json.loads((out / "summary.json").read_text())


def test_every_format_is_fed_and_ends_as_an_image_or_a_reason(tmp_path):
    code, summary = fuzz(tmp_path, "--inputs", "5000")
    assert code == 0
    assert summary["inputs"] >= 5000
    for result in summary["formats"]:
        assert result["findings"] == []
        assert result["ends"]["ok"] > 10, result  # the seeds themselves are images
        assert result["ends"]["truncated"] > 10
        assert sum(result["ends"].values()) == 1000


def test_an_input_beyond_the_bound_of_memory_is_kept_and_fails_the_run(tmp_path):
    flags = ["--formats", "PNG", "--inputs", "200", "--processes", "2"]
    code, summary = fuzz(tmp_path, *flags, STEGO_FUZZ_BYTES="-1")
    assert code == 1
    (result,) = summary["formats"]
    assert result["processes"] == 2
    assert [name.partition("-")[0] for name in result["findings"]] == ["crash"] * len(
        result["findings"]
    )
    assert result["findings"]

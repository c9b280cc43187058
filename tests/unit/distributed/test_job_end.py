"""How a job ends: what its exit code is, and what `status.json` says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stego_core import log
from stego_core.config.schema import MineJob
from stego_core.distributed.job import run_job
from stego_core.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    InputError,
    SchemaError,
    StegoError,
    TooManyFailures,
)
from stego_core.storage.run import RunDirectory

FULL = OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def logging_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the job from setting up the logging of this process, which other tests look at."""
    monkeypatch.setattr(log, "setup", lambda *, debug: None)


def end(out: Path, error: BaseException, *, begun: bool) -> int:
    def run(job: MineJob, where: RunDirectory) -> None:
        if begun:
            where.status("running", stage="mine")
        raise error

    flags = ["--out", str(out)]
    return run_job(
        MineJob, flags, prog="test.py", plan=lambda job: [], run=run, directory=lambda job: job.out
    )


@pytest.mark.parametrize("error", [FULL, ConfigError("no such setting")], ids=["disk", "settings"])
def test_a_job_that_had_begun_does_not_leave_running(tmp_path: Path, error: Exception) -> None:
    assert end(tmp_path, error, begun=True) == 2
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)


@pytest.mark.parametrize("error", [FULL, ConfigError("no such setting")], ids=["disk", "settings"])
def test_a_job_that_never_began_leaves_what_an_earlier_one_said(
    tmp_path: Path, error: Exception
) -> None:
    (tmp_path / "status.json").write_text('{"state": "done"}')
    assert end(tmp_path, error, begun=False) == 2
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "done"}


def test_a_job_that_is_ended_from_outside_says_so(tmp_path: Path) -> None:
    assert end(tmp_path, SystemExit(15), begun=True) == 15  # as Ray does at SIGTERM
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 15)
    assert "ended from outside" in status["error"]


# Numbers, not the classes' own attributes: scripts of users branch on them.
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("a bug"), 1),
        (StegoError("of no kind"), 1),
        (ConfigError("no such setting", "nor this one"), 2),
        (CheckpointError("other settings"), 2),
        (SchemaError("no such column"), 2),
        (InputError("no images"), 3),
        (TooManyFailures("5 of 6"), 4),
        (ClusterError("no CPU is left"), 5),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_each_kind_of_error_ends_a_job_with_its_documented_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    assert end(tmp_path, error, begun=True) == code
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", code)
    event = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert (event["event"], event["exit_code"]) == ("end", code)
    shown = capsys.readouterr().err
    for line in str(error).splitlines():
        is_bug = isinstance(error, RuntimeError)
        assert f"test.py: error: {'unexpected RuntimeError: ' if is_bug else ''}{line}\n" in shown
        assert ("Traceback" in shown) == is_bug


def test_flags_that_are_wrong_end_a_job_with_2_and_nothing_is_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(tmp_path / "run"), "--workers", "none"]
    ends = {"plan": pytest.fail, "run": pytest.fail, "directory": lambda job: job.out}
    assert run_job(MineJob, flags, prog="test.py", **ends) == 2
    assert capsys.readouterr().err.startswith("test.py: error: ")
    assert not (tmp_path / "run").exists()


def test_what_a_store_refuses_is_a_setting_and_no_bug(tmp_path: Path) -> None:
    assert end(tmp_path, PermissionError("ACCESS_DENIED in bucket"), begun=True) == 2


@pytest.mark.parametrize("flag", ["--help", "--dry-run"])
def test_a_reader_of_the_help_or_a_plan_that_has_seen_enough_sees_no_error(flag: str) -> None:
    script = Path(__file__).parents[3] / "jobs" / "doctor.py"
    command = [sys.executable, str(script), flag]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=env, **pipes) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, b"")


def test_a_broken_pipe_of_anything_else_is_an_error() -> None:
    def plan(job: MineJob) -> list[str]:
        raise BrokenPipeError(32, "Broken pipe")

    flags, nothing = ["--dry-run"], {"run": print, "directory": None}
    assert run_job(MineJob, flags, prog="test.py", plan=plan, **nothing) == 1

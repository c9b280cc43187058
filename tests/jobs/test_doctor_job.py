"""The doctor with and without a cluster."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from ray_cluster import TINY, Cluster, free_ports, ray_head

from jobs import doctor
from stego_core.distributed.doctor_ray import check_auth

Run = Callable[..., "Done"]
STATES = ("ok", "warn", "fail", "skip")
ALONE = ["python", "packages", "torch", "cpus", "memory", "disk", "shm", "faiss", "crf", "report"]


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "planted-token")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)


@dataclass(frozen=True)
class Done:
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., Done]:
    """Run the doctor in this process: torch and Ray need not be imported for each case."""

    def run(*flags: str, code: int = 0) -> Done:
        with kept_logging():
            found = doctor.main([*TINY, *flags])
        done = Done(*capsys.readouterr())
        assert found == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert "planted-token" not in done.stdout + done.stderr
        return done

    return run


@contextmanager
def kept_logging() -> Iterator[None]:
    root = logging.getLogger("stego_core")
    before = root.handlers[:], root.level, root.propagate
    try:
        yield
    finally:
        root.handlers[:], root.propagate = before[0], before[2]
        root.setLevel(before[1])


def states(job: Done | subprocess.CompletedProcess) -> dict[str, str]:
    """Return the state of each check, by name, and see that each has one line."""
    rows = [line.split(maxsplit=2) for line in job.stdout.splitlines()]
    assert all(len(row) == 3 and row[0] in STATES for row in rows), job.stdout
    return {name: state for state, name, _ in rows}


def test_it_says_one_line_a_check_and_lets_jobs_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.jpg").write_bytes(b"x")
    flags = ["--input", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    done = run(*flags, "--json", str(tmp_path / "found.json"))
    found = states(done)
    assert [*found][:10] == ALONE
    assert found["input"] == found["out"] == found["weights"] == found["auth"] == "ok"
    assert found["cluster"] == "skip"
    assert not (tmp_path / "out").exists()
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["exit_code"] == 0
    lines = done.stdout.splitlines()
    assert len(record["findings"]) == len(lines)
    for finding, line in zip(record["findings"], lines, strict=True):
        assert finding["found"] in line
        assert finding["state"] == line.split()[0]


@pytest.mark.parametrize(
    ("flags", "code", "failed"),
    [
        (["--input", "missing"], 3, "input"),
        (["--out", "/proc/out", "--input", "missing"], 3, "input, out"),
        (["--out", "/proc/out"], 2, "out"),
        (["--backbone.weights", "missing.pt"], 3, "weights"),
    ],
)
def test_what_failed_first_decides_the_exit_code(
    flags: list[str], code: int, failed: str, run: Run, tmp_path: Path
) -> None:
    done = run(*flags, "--json", str(tmp_path / "found.json"), code=code)
    assert done.stderr.endswith(f"checks failed: {failed}\n")
    assert done.stderr.startswith("doctor.py: error: ")
    assert {name for name, state in states(done).items() if state == "fail"} == {
        *failed.split(", ")
    }
    record = json.loads((tmp_path / "found.json").read_text())
    assert (record["state"], record["exit_code"]) == ("fail", code)


def test_a_cluster_that_does_not_answer_is_code_5(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    done = run(code=5)
    assert states(done)["cluster"] == "fail"
    assert "RAY_ADDRESS" in done.stdout


def test_a_missing_token_and_one_that_others_may_read_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def auth() -> tuple[str, int]:
        (finding,) = check_auth()
        assert "planted-token" not in finding.line()
        return finding.state.value, finding.exit_code

    token = tmp_path / "folder" / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert auth() == ("warn", 0)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert auth() == ("fail", 5)
    token.parent.mkdir()
    token.touch()
    assert auth() == ("fail", 5)
    token.write_text("planted-token")
    token.chmod(0o644)
    token.parent.chmod(0o700)
    assert auth() == ("ok", 0)  # nobody gets as far as the file
    if all(folder.stat().st_mode & 0o011 for folder in token.parents[1:]):
        token.parent.chmod(0o755)
        assert auth() == ("warn", 0)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert auth() == ("warn", 0)


def test_a_dry_run_names_the_checks_and_makes_none(run: Run, tmp_path: Path) -> None:
    done = run("--dry-run", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "x.json"))
    assert done.stdout.startswith("checks: python, ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_the_nodes_of_a_cluster_are_looked_at(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--input", str(data), "--out", str(tmp_path / "out")]
    done = cluster.run("doctor.py", *flags)
    found = states(done)
    assert found["cluster"] == found["nodes"] == found["dashboard"] == "ok"
    assert "input and out looked at from each" in done.stdout
    assert found["auth"] == "warn"  # the tests' cluster asks for no token
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_a_wrong_token_is_one_line_and_code_5(cluster: Cluster, tmp_path: Path) -> None:
    env = {name: value for name, value in cluster.env.items() if name != "RAY_ADDRESS"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32}
    (port,) = free_ports(1)
    flags = ["--num-cpus=1", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    with ray_head(tmp_path, "ray.log", env, *flags, ready_port=port) as address:
        env["RAY_ADDRESS"] = address
        right = replace(cluster, env=env, folder=tmp_path)
        done = right.run("doctor.py", *TINY)
        assert states(done)["cluster"] == states(done)["auth"] == "ok"
        wrong = replace(right, env=env | {"RAY_AUTH_TOKEN": "b" * 32})
        done = wrong.run("doctor.py", *TINY, check=5)
        assert "Traceback" not in done.stderr
        assert states(done)["cluster"] == "fail"
        assert "refuses this token" in done.stdout.splitlines()[-1]

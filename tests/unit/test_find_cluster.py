"""Which cluster a job connects to, without starting one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from stego_core.distributed.cluster import find_cluster
from stego_core.errors import ClusterError


@pytest.fixture
def listener():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    path = tmp_path / "ray" / "ray_current_cluster"
    path.parent.mkdir()
    return path


def test_without_any_trace_of_a_cluster_a_local_one_is_started(note: Path) -> None:
    assert find_cluster() is None


def test_a_port_that_is_no_ray_is_passed_over(
    note: Path, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stego_core.distributed.cluster._HEALTH_TIMEOUT_S", 3.0)
    note.write_text(listener)
    assert find_cluster() is None


def test_a_cluster_that_was_killed_is_passed_over_at_once(
    note: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What takes seconds, Ray's own command, is not asked.
    monkeypatch.setattr("stego_core.distributed.cluster._is_healthy", lambda _: True)
    note.write_text("127.0.0.1:1")
    assert find_cluster() is None


def test_a_named_cluster_that_does_not_answer_is_one_clear_error(
    note: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ClusterError, match="RAY_ADDRESS"):
        find_cluster()


def test_a_named_cluster_is_taken(
    note: Path, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"ray://{listener}")
    assert find_cluster() == f"ray://{listener}"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert find_cluster() is None

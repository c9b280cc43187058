"""What processes that a job starts find in their environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stego_core.distributed.environment import inherited, worker_environment

ROOT = str(Path(__file__).parents[3])
PAGES = "THP_MEM_ALLOC_ENABLE"


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in (PAGES, "PYTHONPATH", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)


def test_a_local_ray_inherits_the_package_and_the_settings_and_nothing_stays():
    before = dict(os.environ)
    with inherited():
        assert (os.environ["PYTHONPATH"], os.environ[PAGES]) == (ROOT, "1")
    assert dict(os.environ) == before


def test_what_the_user_set_is_kept(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv(PAGES, "0")
    before = dict(os.environ)
    with inherited():
        assert os.environ["PYTHONPATH"] == os.pathsep.join([ROOT, "/elsewhere"])
        assert os.environ[PAGES] == "0"
    assert dict(os.environ) == before
    assert worker_environment()["env_vars"][PAGES] == "0"


def test_workers_of_a_cluster_are_told_the_settings_unless_the_submission_was(monkeypatch):
    assert worker_environment()["env_vars"][PAGES] == "1"
    submitted = f'{{"runtime_env": {{"working_dir": "x", "env_vars": {{"{PAGES}": "0"}}}}}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", submitted)
    told = ("AWS_", "STEGO_", "STORAGE_", "HF_")
    for name in [name for name in os.environ if name.startswith(told)]:
        monkeypatch.delenv(name)
    assert worker_environment() == {}


def test_ray_keeps_processes_that_wait_for_the_next_unit(monkeypatch):
    name = "RAY_idle_worker_killing_time_threshold_ms"
    monkeypatch.delenv(name, raising=False)
    with inherited():
        assert os.environ[name] == "600000"
    assert name not in os.environ
    monkeypatch.setenv(name, "5")
    with inherited():
        assert os.environ[name] == "5"
    # A cluster that runs already has read its own: workers need not hear of it.
    assert name not in worker_environment()["env_vars"]

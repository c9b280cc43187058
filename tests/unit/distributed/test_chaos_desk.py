"""The drivers' settings and logs of a soak: local files, kept where the soak writes."""

from __future__ import annotations

import random
import signal
import subprocess

import pytest

from stego_core.config.schema import ChaosJob, SegmentJob
from stego_core.distributed import chaos, chaos_cluster
from stego_core.distributed.chaos_cluster import GivenCluster, LocalCluster
from stego_core.distributed.chaos_desk import keep, local_folder
from stego_core.errors import ClusterError
from stego_core.storage import fs
from stego_core.storage.run import RunDirectory


def test_in_a_folder_the_files_lie_beside_the_outputs_and_stay_as_they_are(tmp_path):
    run = RunDirectory(str(tmp_path / "runs" / "soak"), job="chaos")
    with local_folder(run) as folder:
        assert folder == tmp_path / "runs" / "soak"
        file = folder / "calm.log"
        file.write_bytes(b"half a letter: \xc3")
        keep(run, file)
    assert file.read_bytes() == b"half a letter: \xc3"


def test_in_a_store_the_files_lie_in_a_temporary_folder_and_what_is_kept_is_redacted():
    run = RunDirectory("memory://soaks/kept", job="chaos")
    with local_folder(run) as folder:
        (folder / "calm.toml").write_text("out = 'memory://soaks/kept/calm'\n")
        (folder / "calm.log").write_bytes(b"aws_secret_access_key=abc/def\nhalf a letter: \xc3")
        keep(run, folder / "calm.log")
    assert not folder.exists()
    assert fs.list_names(run.uri) == ["calm.log"]
    kept = fs.read_bytes(run.path("calm.log")).decode()
    assert kept == "aws_secret_access_key=***\nhalf a letter: \ufffd"


def test_the_temporary_folder_is_gone_after_an_error_too():
    run = RunDirectory("memory://soaks/failed", job="chaos")
    with pytest.raises(ValueError, match="the soak"), local_folder(run) as folder:
        raise ValueError("the soak")
    assert not folder.exists()


def test_a_soak_that_is_ended_ends_the_job_that_it_disturbs(tmp_path, monkeypatch):
    script = tmp_path / "job.py"
    script.write_text("import time\ntime.sleep(600)\n")
    run = RunDirectory(str(tmp_path / "soak"), job="chaos")
    one = SegmentJob(out=str(tmp_path / "soak" / "calm"))
    disturbed = chaos._Round(ChaosJob(), one, run, script, tmp_path)
    drivers = []

    def ended(driver, seconds):
        drivers.append(driver)
        raise SystemExit

    monkeypatch.setattr(disturbed, "_lives", ended)
    with pytest.raises(SystemExit):
        disturbed.finish(GivenCluster(), random.Random(0), chaos.Tally(), faults=1)
    assert drivers[0].returncode == -signal.SIGKILL


def test_a_cluster_that_does_not_start_leaves_no_process(monkeypatch):
    hosts = []
    popen = subprocess.Popen

    def silent(command, **options):  # says nothing and goes on
        host = popen(["sh", "-c", "exec sleep 600 >&-"], **options)
        hosts.append(host)
        return host

    monkeypatch.setattr(chaos_cluster.subprocess, "Popen", silent)
    with pytest.raises(ClusterError, match="did not start"):
        LocalCluster(nodes=1, num_cpus=1)
    assert hosts[0].returncode == -signal.SIGKILL

"""Two jobs on one output: the second is told, and a dead one stands in nobody's way."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from stego_core.errors import CheckpointError, ClusterError
from stego_core.storage import fs
from stego_core.storage.lease import hold

BEAT_S = 0.05


def test_a_second_job_on_a_local_output_is_refused_and_told_who_holds_it(tmp_path):
    held = f"process {os.getpid()} on"
    with (
        hold(str(tmp_path)),
        pytest.raises(CheckpointError, match=held),
        hold(str(tmp_path)),
    ):
        pass
    with hold(str(tmp_path)):
        pass


def test_a_killed_job_holds_nothing(tmp_path):
    code = (
        "import sys, time\nfrom stego_core.storage.lease import hold\n"
        "with hold(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"process {other.pid} on"), hold(str(tmp_path)):
            pass
        other.send_signal(signal.SIGKILL)
    with hold(str(tmp_path)):
        pass


@pytest.fixture
def store():
    uri = "memory://lease-tests/out"
    yield uri
    fs.delete("memory://lease-tests")


def test_a_second_job_sees_the_signs_of_life_of_the_first(store):
    with hold(store, beat_s=BEAT_S) as lease:
        with pytest.raises(CheckpointError, match="another job"), hold(store, beat_s=BEAT_S):
            pass
        lease.check()
    assert not fs.exists(fs.join(store, "_owner.json"))


def test_an_owner_that_gives_no_sign_of_life_is_replaced(store):
    dead = {"host": "gone", "pid": 1, "id": "x", "beat": 7}
    fs.write_bytes(fs.join(store, "_owner.json"), json.dumps(dead).encode())
    with hold(store, beat_s=BEAT_S) as lease:
        lease.check()
        assert json.loads(fs.read_bytes(fs.join(store, "_owner.json")))["pid"] == os.getpid()


def test_a_job_that_was_taken_over_is_told(store):
    uri = fs.join(store, "_owner.json")
    with hold(store, beat_s=BEAT_S) as lease:
        fs.write_bytes(uri, b'{"id": "another"}')
        for _ in range(100):
            if lease.is_lost:
                break
            threading.Event().wait(BEAT_S)
        with pytest.raises(ClusterError, match="another job took this output over"):
            lease.check()
    assert fs.read_bytes(uri) == b'{"id": "another"}'

"""Two jobs on one output: the second is told, and a dead one stands in nobody's way."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from botocore.exceptions import ClientError

from stego_core.errors import CheckpointError, ClusterError, InputError
from stego_core.storage import fs
from stego_core.storage import lease as lease_module
from stego_core.storage.lease import hold

BEAT_S = 0.05


def wait_for(condition):
    for _ in range(2400):
        if condition():
            return
        threading.Event().wait(BEAT_S)
    raise AssertionError("it did not come about")


def beat_of(uri):
    return json.loads(fs.read_bytes(uri))["beat"]


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
def store(monkeypatch):
    """An output in memory, whose reads and writes are whole as those of an object store are.

    Readers of a file in memory:// share its position, and a writer empties it before it fills it.
    """
    whole = threading.RLock()

    def one_at_a_time(call):
        def locked(*args):
            with whole:
                return call(*args)

        return locked

    for name in ("read_bytes", "read_if_exists", "write_bytes", "delete", "exists"):
        monkeypatch.setattr(fs, name, one_at_a_time(getattr(fs, name)))
    yield "memory://lease-tests/out"
    fs.delete("memory://lease-tests")


def test_a_second_job_sees_the_signs_of_life_of_the_first(store):
    with hold(store, beat_s=BEAT_S) as lease:
        # It looks for longer than a busy machine keeps a thread from its beat.
        with pytest.raises(CheckpointError, match="another job"), hold(store, beat_s=10 * BEAT_S):
            pass
        lease.check()
    assert not fs.exists(fs.join(store, "_owner.json"))


def test_an_owner_that_gives_no_sign_of_life_is_replaced(store):
    dead = {"host": "gone", "pid": 1, "id": "x", "beat": 7}
    fs.write_bytes(fs.join(store, "_owner.json"), json.dumps(dead).encode())
    with hold(store, beat_s=BEAT_S) as lease:
        lease.check()
        assert json.loads(fs.read_bytes(fs.join(store, "_owner.json")))["pid"] == os.getpid()


@pytest.mark.parametrize("torn", [b"", b'{"host": "go', b"[1, 2]", b"\xff\x00"])
def test_a_record_that_says_nothing_of_its_owner_is_replaced(store, torn):
    fs.write_bytes(fs.join(store, "_owner.json"), torn)
    with hold(store, beat_s=BEAT_S) as lease:
        lease.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lease_that_is_renewed_no_more_is_lost(store, monkeypatch):
    with hold(store, beat_s=BEAT_S) as lease:

        def fail(*args):
            raise RuntimeError("a client that is broken for good")

        monkeypatch.setattr(fs, "write_bytes", fail)
        wait_for(lambda: lease.is_lost)


def test_a_job_that_was_taken_over_is_told(store):
    uri = fs.join(store, "_owner.json")
    with hold(store, beat_s=BEAT_S) as lease:
        # Again and again: memory:// has no conditions, and a beat may have been about to write.
        wait_for(lambda: fs.write_bytes(uri, b'{"id": "another"}') or lease.is_lost)
        with pytest.raises(ClusterError, match="another job took this output over"):
            lease.check()
    assert fs.read_bytes(uri) == b'{"id": "another"}'


@pytest.mark.parametrize("is_written", [False, True], ids=["request lost", "answer lost"])
def test_beats_that_fail_do_not_lose_the_lease(store, monkeypatch, is_written):
    uri = fs.join(store, "_owner.json")
    write, failures = fs.write_bytes, []
    with hold(store, beat_s=BEAT_S) as lease:

        def fail(*args):
            if is_written:
                write(*args)
            failures.append(args)
            raise OSError("the store is away")

        monkeypatch.setattr(fs, "write_bytes", fail)
        wait_for(lambda: len(failures) >= 3)
        monkeypatch.setattr(fs, "write_bytes", write)
        seen = beat_of(uri)
        wait_for(lambda: beat_of(uri) > seen + 1)
        lease.check()


class Refusing:
    """A client of a store that answers each put with one error."""

    def __init__(self, code, status):
        self.answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}

    def put_object(self, **_):
        raise ClientError(self.answer, "PutObject")


@pytest.mark.parametrize(
    ("code", "status", "kind", "says"),
    [
        ("NoSuchBucket", 404, InputError, "s3://b: no such bucket"),
        ("AccessDenied", 403, PermissionError, "s3://b/out/_owner.json: .*AccessDenied"),
    ],
)
def test_a_bucket_that_is_not_there_or_refuses_is_told(monkeypatch, code, status, kind, says):
    monkeypatch.setattr(lease_module, "s3_client", lambda: Refusing(code, status))
    monkeypatch.setattr(fs, "read_if_exists", lambda uri: None)
    with pytest.raises(kind, match=says), hold("s3://b/out", beat_s=BEAT_S):
        pass


def test_a_store_that_fails_for_a_moment_is_asked_again(monkeypatch):
    answers = iter([OSError("SLOW_DOWN"), OSError("SLOW_DOWN"), True])

    def put(self, replaces, *, is_new):
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(lease_module._Remote, "_put_s3", put)
    monkeypatch.setattr(fs, "read_if_exists", lambda uri: None)
    lease_module._Remote("s3://b/out/_owner.json", BEAT_S).acquire()
    assert next(answers, None) is None


def test_what_ends_leaves_the_lease_of_its_successor(store):
    uri = fs.join(store, "_owner.json")
    with hold(store, beat_s=60) as lease:  # so that it does not notice
        fs.write_bytes(uri, b'{"id": "another"}')
        assert not lease.is_lost
    assert fs.read_bytes(uri) == b'{"id": "another"}'


def test_a_store_that_is_away_at_the_end_changes_no_outcome(store, monkeypatch, caplog):
    def fail(*args):
        raise OSError("the store is away")

    with hold(store, beat_s=60):
        monkeypatch.setattr(fs, "delete", fail)
    assert "could not be deleted" in caplog.text
    monkeypatch.undo()


def test_a_lease_that_somebody_removed_is_lost(store):
    with hold(store, beat_s=BEAT_S) as lease:
        wait_for(lambda: fs.delete(fs.join(store, "_owner.json")) or lease.is_lost)


def test_a_job_that_ends_while_another_waits_for_it_makes_room(store, monkeypatch):
    uri, waits = fs.join(store, "_owner.json"), []
    fs.write_bytes(uri, b'{"id": "another", "host": "there", "pid": 1}')

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            fs.delete(uri)

    monkeypatch.setattr(lease_module.time, "sleep", wait)
    with hold(store, beat_s=BEAT_S) as lease:
        lease.check()
    assert waits == [BEAT_S, BEAT_S]

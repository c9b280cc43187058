"""What is repeated, how long, and what never is."""

import errno
from functools import partial

import pytest

from stego_core.storage import fs, retry
from stego_core.storage.retry import is_passing, repeated, retried


class Store:
    """Fails so many times, then answers."""

    def __init__(self, failures, error):
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "answer"


THROTTLED = OSError("AWS Error SLOW_DOWN during PutObject operation: Please reduce your rate")


def test_waits_grow_are_drawn_and_end_with_the_answer():
    waits, others = [], []
    store = Store(8, THROTTLED)
    assert retried(store, sleep=waits.append) == "answer"
    retried(Store(8, THROTTLED), sleep=others.append)
    assert len(waits) == 8
    assert waits != others  # two workers that were refused at once do not come back at once
    for number, wait_s in enumerate(waits):
        longest_s = min(0.25 * 2**number, 15)
        assert longest_s / 2 <= wait_s <= longest_s


def test_a_fault_that_lasts_is_raised_after_the_time_that_is_given():
    waits = []
    with pytest.raises(OSError, match="SLOW_DOWN"):
        retried(Store(10**6, THROTTLED), seconds=100, sleep=waits.append)
    assert 100 <= sum(waits) < 115


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no such key"),
        PermissionError(errno.EACCES, "not yours"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
        OSError("AWS Error NO_SUCH_BUCKET during PutObject operation"),
    ],
)
def test_what_repetition_can_not_change_is_raised_at_once(error):
    store = Store(1, error)
    with pytest.raises(type(error)):
        retried(store, sleep=pytest.fail)
    assert store.calls == 1


@pytest.mark.parametrize(
    "text",
    [
        "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 56",
        "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation",
        "AWS Error INTERNAL_FAILURE during PutObject operation",
        "AWS Error SERVICE_UNAVAILABLE during GetObject operation: ",
    ],
)
def test_what_a_store_says_when_it_is_away_passes(text):
    assert is_passing(OSError(text))


REFUSED = OSError("AWS Error ACCESS_DENIED during GetObject operation: No response body.")


@pytest.fixture
def doubts(monkeypatch):
    """No doubts of earlier tests, and no waiting."""
    monkeypatch.setattr(retry, "_doubts", retry._Doubts())
    monkeypatch.setattr(retry, "retried", partial(retried, sleep=lambda seconds: None))


def test_a_refusal_of_a_bucket_that_has_answered_is_not_believed_at_once(doubts):
    uri = "s3://bucket/photos/a.jpg"
    for _ in range(2):  # nothing is known of the bucket
        store = Store(2, REFUSED)
        with pytest.raises(PermissionError):
            repeated(uri, store)
        assert store.calls == 1
    assert repeated(uri, Store(0, REFUSED)) == "answer"
    for _ in range(50):  # it was wrong each time: the store has an hour of these
        assert repeated("s3://bucket/photos/b.jpg", Store(3, REFUSED)) == "answer"
    with pytest.raises(PermissionError):  # another bucket
        repeated("s3://other/a.jpg", Store(1, REFUSED))


def test_a_bucket_that_means_what_it_says_costs_a_few_looks(doubts):
    repeated("s3://bucket/fine.jpg", Store(0, REFUSED))
    calls = []
    for number in range(30):
        store = Store(10**6, REFUSED)
        with pytest.raises(PermissionError):
            repeated(f"s3://bucket/{number}.jpg", store)
        calls.append(store.calls)
        repeated("s3://bucket/fine.jpg", Store(0, REFUSED))
    assert min(calls[:8]) > 2
    assert {*calls[8:]} == {1}


def test_local_files_are_not_asked_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("stego_core.storage.retry.retried", pytest.fail)
    fs.write_bytes(str(tmp_path / "x"), b"1")
    with pytest.raises(FileNotFoundError):
        fs.read_bytes(str(tmp_path / "y"))

"""Folders that can't be read or written, servers that don't answer, clocks that are off."""

from __future__ import annotations

import os
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from stego_core.doctor.findings import State, examine
from stego_core.doctor.stores import (
    check_clock,
    check_input,
    check_out,
    store_address,
    store_date,
)
from stego_core.errors import InputError
from stego_core.storage import fs


def one(check, *args):
    (finding,) = examine([("x", lambda: check(*args))])
    assert "\n" not in finding.line()
    return finding


@pytest.fixture(autouse=True)
def _no_store(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


def test_the_first_file_of_an_input_is_read(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"12345")
    finding = one(check_input, str(tmp_path))
    assert finding.state is State.OK
    assert "a/1.jpg read, 5 bytes" in finding.found


def test_a_file_whose_name_is_not_utf8_is_passed_over(tmp_path):
    (tmp_path / os.fsdecode(b"a\xe9.jpg")).write_bytes(b"1")
    (tmp_path / "b.jpg").write_bytes(b"12")
    assert "b.jpg read, 2 bytes" in one(check_input, str(tmp_path)).found


@pytest.mark.parametrize("kind", ["missing", "empty", "a file", "foo://x"])
def test_an_input_with_nothing_to_read_fails_with_code_3(kind, tmp_path):
    path = tmp_path / "in"
    if kind == "empty":
        path.mkdir()
    elif kind == "a file":
        path.write_text("x")
    finding = one(check_input, kind if "://" in kind else str(path))
    assert (finding.state, finding.exit_code) == (State.FAIL, 3)


def test_a_file_that_can_not_be_read_fails(tmp_path):
    # Root may read everything; what is a folder when it is opened can be read by nobody.
    (tmp_path / "1.jpg").write_bytes(b"x")
    (tmp_path / "1.jpg").chmod(0)
    finding = one(check_input, str(tmp_path))
    if os.geteuid():
        assert (finding.state, finding.exit_code) == (State.FAIL, 3)
        assert "Permission denied" in finding.found


def test_an_output_is_left_as_it_was(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("x")
    for out in (tmp_path, tmp_path / "new" / "folder"):
        assert one(check_out, str(out)).state is State.OK
    assert list(tmp_path.iterdir()) == [kept]


def test_an_output_below_a_file_fails_with_code_2_and_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("x")
    finding = one(check_out, str(tmp_path / "file" / "out"))
    assert (finding.state, finding.exit_code) == (State.FAIL, 2)
    assert "--out" in finding.advice


@pytest.mark.skipif(not os.access("/proc/version", os.R_OK), reason="no /proc here")
def test_an_output_where_nobody_may_write_fails():
    finding = one(check_out, "/proc/out")  # not even root may
    assert (finding.state, finding.exit_code) == (State.FAIL, 2)


def test_a_store_that_nobody_answers_for_fails_at_once(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("list_files", "write_bytes"):  # requests that are repeated for minutes
        monkeypatch.setattr(fs, name, lambda *_: pytest.fail("asked although nobody answers"))
    for check in (check_input, check_out):
        finding = one(check, "s3://bucket/x")
        assert (finding.state, finding.exit_code) == (State.FAIL, 3)
        assert "AWS_ENDPOINT_URL" in finding.found


def test_the_address_of_a_store_is_the_one_that_jobs_use(monkeypatch):
    assert store_address("/a/folder") is None
    assert store_address("gs://bucket") is None
    assert store_address("s3://bucket") == "https://s3.amazonaws.com"
    monkeypatch.setenv("AWS_REGION", "cn-north-1")
    assert store_address("s3://bucket") == "https://s3.cn-north-1.amazonaws.com.cn"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.example:9000")
    assert store_address("s3a://bucket") == "http://store.example:9000"


class _Refusing(BaseHTTPRequestHandler):
    """A store that allows nothing and whose clock is an hour slow."""

    def do_HEAD(self):
        self.send_response_only(403)
        self.send_header("Date", formatdate(time.time() - 3600, usegmt=True))
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_clock_an_hour_off_fails_and_a_store_that_refuses_still_tells_the_time(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), _Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert store_date(address) == pytest.approx(time.time() - 3600, abs=60)
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        finding = one(check_clock, ["s3://a", "s3://b"])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert (finding.state, finding.exit_code) == (State.FAIL, 3)
    assert "NTP" in finding.advice


@pytest.mark.parametrize(("off_s", "state"), [(0, "ok"), (120, "warn"), (-700, "fail")])
def test_clocks_are_judged_by_their_difference(off_s, state):
    (finding,) = check_clock(["s3://a"], ask=lambda _: time.time() + off_s)
    assert finding.state.value == state


def test_a_store_that_does_not_tell_its_time_and_no_store_at_all_are_passed_over():
    assert [f.state for f in check_clock(["s3://a"], ask=lambda _: None)] == [State.SKIP]
    assert [f.state for f in check_clock(["/a"])] == [State.SKIP]


def test_only_http_is_asked():
    with pytest.raises(InputError, match="AWS_ENDPOINT_URL"):
        store_date("file:///etc/passwd")

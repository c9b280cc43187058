"""One line a check, all checks are made, and the first failure decides."""

from __future__ import annotations

import pytest

from stego_core.doctor.findings import Finding, State, conclude, examine
from stego_core.errors import ClusterError, ConfigError, InputError


def good():
    yield Finding("good", State.OK, "here")


def refused():
    yield Finding("half", State.OK, "looked")
    raise InputError("nothing to read\nsecond line")


def broken():
    raise OSError("libxyz.so: cannot open\nshared object")
    yield


def test_a_check_that_raises_is_one_failure_and_the_next_ones_are_made():
    found = list(examine([("a", refused), ("b", broken), ("c", good)]))
    assert [f.state.value for f in found] == ["ok", "fail", "fail", "ok"]
    assert [f.exit_code for f in found] == [0, 3, 2, 0]
    assert found[1].found == "nothing to read"
    assert found[2].found == "OSError: libxyz.so: cannot open shared object"
    assert all("\n" not in f.line() for f in found)


@pytest.mark.parametrize("error", [ConfigError, InputError, ClusterError])
def test_the_first_failure_decides_how_the_doctor_ends(error):
    first = Finding("out", State.FAIL, "x", exit_code=error.exit_code)
    last = Finding("disk", State.FAIL, "y", exit_code=5)
    with pytest.raises(error, match="2 of 3 checks failed: out, disk"):
        conclude([next(good()), first, last])


def test_warnings_and_what_was_passed_over_let_jobs_run():
    conclude([Finding("a", State.WARN, "x"), Finding("b", State.SKIP, "y")])


def test_a_line_shows_no_credential():
    line = Finding("out", State.FAIL, "s3://me:hunter2@bucket: no", "secret=hunter2").line()
    assert "hunter2" not in line
    assert line.count("***") == 2

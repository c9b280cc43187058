"""The search for pictures that end or stop the process that computes with them."""

import os
import signal
import time

import numpy as np
import pyarrow as pa
import pytest

from stego_core.distributed.culprits import NotThePictures, Search, set_aside
from stego_core.errors import ConfigError

KILL, RAISE, HANG, REFUSE, BLACK = 1, 2, 3, 4, 0


def unit(*marks):
    """A unit whose pictures are filled with their marks; None could not be decoded."""
    pixels = [None if mark is None else bytes([mark]) * 12 for mark in marks]
    return pa.table(
        {
            "image_id": range(len(marks)),
            "status": ["not_an_image" if mark is None else "ok" for mark in marks],
            "detail": pa.array(["no picture" if m is None else None for m in marks], pa.string()),
            "pixels": pa.array(pixels, pa.large_binary()),
            "pixel_height": pa.array([None if mark is None else 2 for mark in marks], pa.int32()),
            "pixel_width": pa.array([None if mark is None else 2 for mark in marks], pa.int32()),
        }
    )


def start(log, *, kills=KILL):
    """Return the computation; runs in a child, as a model would."""

    def compute(table):
        marks = [data[0] for data in table["pixels"].to_pylist() if data is not None]
        with log.open("a") as file:
            file.write(f"{len(marks)}\n")
        if kills in marks:
            os.kill(os.getpid(), signal.SIGSEGV)
        if RAISE in marks:
            raise RuntimeError("two\nlines")
        if HANG in marks:
            time.sleep(3600)
        if REFUSE in marks:
            raise ConfigError("said by the stage itself")

    return compute


@pytest.fixture
def search(tmp_path):
    def searched(table, **options):
        found = Search(lambda: start(tmp_path / "log", **options), seconds=0.2, memory=lambda: None)
        try:
            return found.set_aside(table)
        finally:
            found.close()

    searched.tries = lambda: [int(line) for line in (tmp_path / "log").read_text().split()]
    return searched


def test_each_culprit_has_its_reason_and_no_other_picture_is_touched(search):
    table = unit(9, KILL, 9, None, 9, RAISE, 9, 9, HANG, 9)
    found = search(table)
    expected = table.to_pylist()
    problems = {
        1: ("crashed", "the process that computed with it ended: SIGSEGV"),
        5: ("crashed", "RuntimeError: two lines"),
        8: ("timed_out", "computing took more than 0.2 s"),
    }
    for row, (status, detail) in problems.items():
        expected[row] |= {"status": status, "detail": detail}
        expected[row] |= dict.fromkeys(("pixels", "pixel_height", "pixel_width"))
    assert found.to_pylist() == expected
    assert found.schema == table.schema


def test_a_unit_without_culprits_is_computed_once(search):
    table = unit(9, 8, None, REFUSE)
    assert search(table) is table
    assert search.tries() == [3]


@pytest.mark.parametrize("place", range(8))
def test_one_of_eight_is_found_by_halves(search, place):
    marks = [9] * 8
    marks[place] = KILL
    statuses = search(unit(*marks))["status"].to_pylist()
    assert [row for row, status in enumerate(statuses) if status != "ok"] == [place]
    # The unit, a black picture, half after half, and the culprit a second time.
    tries = search.tries()
    assert tries[:2] == [8, 1]
    assert sorted(tries[2:]) == [1, 1, 1, 2, 2, 4, 4]


def test_a_computation_that_fails_at_a_black_picture_is_no_pictures_fault(search):
    with pytest.raises(NotThePictures, match="SIGSEGV"):
        search(unit(BLACK, 9, 9), kills=BLACK)


def test_pictures_that_fail_only_together_are_left_to_the_stage(tmp_path):
    def start_together():
        def compute(table):
            if table["pixels"].null_count == 0:
                raise MemoryError

        return compute

    found = Search(start_together, seconds=1, memory=lambda: None)
    table = unit(9, 9, 9, 9)
    assert found.set_aside(table) is table
    found.close()


def test_memory_beyond_what_is_allowed_is_a_reason():
    def start_hoarding():
        def compute(table):
            if table["pixels"][1].as_py() is not None:
                np.ones(10**9)

        return compute

    found = Search(start_hoarding, seconds=9, memory=lambda: 2**30)
    failed = found.set_aside(unit(9, 9, 9)).to_pylist()[1]
    found.close()
    assert failed["status"] == "crashed"
    assert "Unable to allocate" in failed["detail"]


def test_rows_can_be_set_aside_where_pixels_are_gone():
    table = unit(9, 9).drop_columns(["pixels"])
    found = set_aside(table, {0: ("crashed", "why")})
    assert found["status"].to_pylist() == ["crashed", "ok"]
    assert found["pixel_height"].to_pylist() == [None, 2]

"""The search for pictures that end or stop the process that computes with them."""

import os
import signal
import sys
import time

import numpy as np
import pyarrow as pa
import pytest

from stego_core.distributed import culprits, units
from stego_core.distributed.culprits import NotThePictures, Search, limit_s, set_aside
from stego_core.errors import ConfigError

KILL, RAISE, HANG, REFUSE, BLACK = 1, 2, 3, 4, 0
SIZES = ("pixel_height", "pixel_width", "image_height", "image_width")


def unit(*marks):
    """A unit whose pictures are filled with their marks; None could not be decoded."""
    pixels = [None if mark is None else bytes([mark]) * 12 for mark in marks]
    return pa.table(
        {
            "image_id": range(len(marks)),
            "status": ["not_an_image" if mark is None else "ok" for mark in marks],
            "detail": pa.array(["no picture" if m is None else None for m in marks], pa.string()),
            "pixels": pa.array(pixels, pa.large_binary()),
        }
        | {name: pa.array([m if m is None else 2 for m in marks], pa.int32()) for name in SIZES}
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
    # Where nothing hangs a try has all the time that a busy machine may take for it.
    def searched(table, *, seconds=60, **options):
        log = tmp_path / "log"
        found = Search(lambda: start(log, **options), seconds=seconds, memory=lambda: None)
        try:
            return found.set_aside(table)
        finally:
            found.close()

    searched.tries = lambda: [int(line) for line in (tmp_path / "log").read_text().split()]
    return searched


def test_each_culprit_has_its_reason_and_no_other_picture_is_touched(search):
    table = unit(9, KILL, 9, None, 9, RAISE, 9, 9)
    found = search(table)
    expected = table.to_pylist()
    problems = {
        1: ("crashed", "the process that computed with it ended: SIGSEGV"),
        5: ("crashed", "RuntimeError: two lines"),
    }
    for row, (status, detail) in problems.items():
        expected[row] |= {"status": status, "detail": detail}
        expected[row] |= dict.fromkeys(SIZES)
        expected[row]["pixels"] = None
    assert found.to_pylist() == expected
    assert found.schema == table.schema


def test_a_picture_that_hangs_is_late(search, monkeypatch):
    # The black picture and a last word have 5 s, the tries in between need not take so long.
    monkeypatch.setattr(culprits, "_LEAST_S", 0.5)
    first, second = search(unit(9, HANG), seconds=5).to_pylist()
    assert first["status"] == "ok"
    assert (second["status"], second["detail"]) == ("timed_out", "computing took more than 5 s")


def test_a_unit_without_culprits_is_computed_once_after_a_black_picture(search):
    table = unit(9, 8, None, REFUSE)
    assert search(table) is table
    assert search.tries() == [1, 3]


@pytest.mark.parametrize("place", [0, 3, 7])
def test_one_of_eight_is_found_by_halves(search, place):
    marks = [9] * 8
    marks[place] = KILL
    statuses = search(unit(*marks))["status"].to_pylist()
    assert [row for row, status in enumerate(statuses) if status != "ok"] == [place]
    # A black picture, the unit, half after half, and the culprit a second time.
    tries = search.tries()
    assert tries[:2] == [1, 8]
    assert sorted(tries[2:]) == [1, 1, 1, 2, 2, 4, 4]


def test_a_computation_that_fails_at_a_black_picture_is_no_pictures_fault(search):
    with pytest.raises(NotThePictures, match="SIGSEGV"):
        search(unit(BLACK, 9, 9), kills=BLACK)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_label_or_score_is_a_culprit_as_well(place):
    def start_scoring():
        def compute(table):
            for row in table.to_pylist():
                if row["pixels"] is not None and (row["label"] == b"!" or row["products"] == b"!"):
                    raise ValueError

        return compute

    for column in ("label", "products"):
        cells = [b"!" if row == place else b"?" for row in range(3)]
        other = ({"label", "products"} - {column}).pop()
        table = unit(9, 9, 9).append_column(column, pa.array(cells, pa.large_binary()))
        table = table.append_column(other, pa.nulls(3, pa.large_binary()))
        found = Search(start_scoring, seconds=60, memory=lambda: None)
        statuses = found.set_aside(table)["status"].to_pylist()
        found.close()
        assert [row for row, status in enumerate(statuses) if status != "ok"] == [place]


@pytest.mark.parametrize("black_s", [0.05, 0.3, 1.0])
def test_all_tries_of_a_picture_that_hangs_end_before_ray_gives_up(black_s):
    # Halves of 32 down to the picture itself: each try with it takes all the time it may.
    limits = [limit_s(n, seconds=120, black_s=black_s) for n in (32, 16, 8, 4, 2, 1)]
    assert black_s + sum(limits) + 120 < 0.6 * units._NO_PROGRESS_S
    # And a batch that takes as long as its pictures by themselves is not late.
    assert all(limits[i] >= min(120, 2 * black_s * 2 ** (5 - i)) for i in range(6))


def test_pictures_that_fail_only_together_are_left_to_the_stage(tmp_path):
    def start_together():
        def compute(table):
            if table["pixels"].null_count == 0:
                raise MemoryError

        return compute

    found = Search(start_together, seconds=60, memory=lambda: None)
    table = unit(9, 9, 9, 9)
    assert found.set_aside(table) is table
    found.close()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux only")
def test_memory_beyond_what_is_allowed_is_a_reason():
    def start_hoarding():
        def compute(table):
            if table["pixels"][1].as_py() is not None:
                np.ones(10**9)

        return compute

    found = Search(start_hoarding, seconds=60, memory=lambda: 2**30)
    failed = found.set_aside(unit(9, 9, 9)).to_pylist()[1]
    found.close()
    assert failed["status"] == "crashed"
    assert "Unable to allocate" in failed["detail"]


def test_rows_can_be_set_aside_where_pixels_are_gone():
    table = unit(9, 9).drop_columns(["pixels"])
    found = set_aside(table, {0: ("crashed", "why")})
    assert found["status"].to_pylist() == ["crashed", "ok"]
    assert all(found[name].to_pylist() == [None, 2] for name in SIZES)

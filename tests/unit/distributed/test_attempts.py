"""What is pending is started again after a failure of Ray, as long as something gets done."""

from __future__ import annotations

from itertools import count

import pytest
from ray.exceptions import RayError

from stego_core.distributed import units
from stego_core.distributed.cluster import ActorPlan
from stego_core.distributed.units import ATTEMPTS, Stage, run_units
from stego_core.errors import ClusterError


@pytest.fixture
def run(monkeypatch):
    """Run five units on a Ray that fails after so many of them, attempt after attempt."""
    monkeypatch.setattr(units, "configure", lambda **_: None)
    monkeypatch.setattr(units, "start_ledger", lambda: None)
    monkeypatch.setattr(units, "_planned", lambda actors, attempt: actors)
    monkeypatch.setattr(units.time, "sleep", lambda seconds: None)

    def run(*fails_after, seconds=1.0):
        done, attempts = [], []
        clock = count(step=seconds)
        monkeypatch.setattr(units.time, "monotonic", lambda: next(clock))

        def stream(pending, ledger, stages, actors, seconds):
            attempts.append(list(pending))
            for number, unit in enumerate(pending):
                if number == fails_after[len(attempts) - 1]:
                    raise RayError("a node\nwas lost")
                yield {"unit": unit}

        monkeypatch.setattr(units, "_stream", stream)
        stage, plan = Stage(len, {}), ActorPlan(1, num_cpus=1, num_gpus=0, threads=1)
        receipts = run_units(
            lambda: [unit for unit in range(6) if unit not in done],
            fetch=stage,
            work=stage,
            finish=stage,
            actors=plan,
            seconds=1,
        )
        try:
            for receipt in receipts:
                done.append(receipt["unit"])
        except ClusterError as error:
            return done, attempts, str(error)
        return done, attempts, ""

    return run


def test_only_the_rest_is_run_again(run):
    done, attempts, error = run(2, 1, 9)
    assert (done, error) == ([0, 1, 2, 3, 4, 5], "")
    assert attempts == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [3, 4, 5]]


def test_an_attempt_that_completes_nothing_is_the_last(run):
    done, attempts, error = run(2, 0, 9)
    assert (done, len(attempts)) == ([0, 1], 2)
    assert error == "Ray failed 2 time(s), last: was lost"


def test_there_are_five_short_attempts_at_most(run):
    done, attempts, error = run(*[1] * 9)
    assert (len(done), len(attempts)) == (5, 5) == (ATTEMPTS, ATTEMPTS)
    assert error.startswith("Ray failed 5 time(s)")


def test_an_attempt_of_more_than_an_hour_is_not_counted(run):
    done, attempts, error = run(*[1] * 5, 9, seconds=3601.0)
    assert (done, len(attempts), error) == ([0, 1, 2, 3, 4, 5], 6, "")


def test_units_have_blocks_of_their_own_however_many_there_are(run, monkeypatch):
    monkeypatch.setattr(units, "MAX_BLOCKS", 4)
    done, plans, error = run(9, 9)
    assert (done, error) == ([0, 1, 2, 3, 4, 5], "")
    assert plans == [[0, 1, 2, 3], [4, 5]]

"""The rates that a stage reports, and the steady one beside a simulated stage of known rate."""

import heapq
import json
from pathlib import Path

import numpy as np
import pytest

from stego_core.distributed import progress
from stego_core.distributed.progress import steady_rate
from stego_core.storage.run import RunDirectory

BATCHES, SEEDS = 4, 200  # batches of a unit, simulated runs of each kind


def finished(folder: Path, seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> dict:
    """The `done` event of a stage of 10-image units that are done at these seconds."""
    clock = iter([100.0, *(100.0 + s for s in seconds), 100.0 + seconds[-1]])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    run = RunDirectory.__new__(RunDirectory)
    monkeypatch.setattr(RunDirectory, "count", lambda *_, **__: None)
    monkeypatch.setattr(RunDirectory, "status", lambda *_, **__: None)
    events = []
    monkeypatch.setattr(RunDirectory, "event", lambda _, name, **values: events.append(values))
    stage = progress.Progress(run, stage="segment", total=10 * len(seconds), at_once=2)
    for _ in seconds:
        stage.add({"ok": 10})
    stage.finish()
    (event,) = events
    return json.loads(json.dumps(event))


def simulated(units: int, *, actors: int, threads: int, burst: int, seed: int):
    """Seconds and batches done at the end of each unit; a thread does a batch a second.

    Actors start within five seconds, take a unit as soon as one of their two is done, and compute
    batches in turn on threads of their own, each a second give or take 5 %. The last unit is a
    quarter of the others. Ends are told `burst` at a time.
    """
    draw = np.random.default_rng(seed)
    free = [[start] * threads for start in draw.random(actors) * 5]
    waiting = [1, *[BATCHES] * (units - 1)]
    ends: list[tuple[float, int, int]] = []

    def begin(actor: int, now: float) -> None:
        if waiting:
            size, end = waiting.pop(), now
            for _ in range(size):
                thread = int(np.argmin(free[actor]))
                free[actor][thread] = max(free[actor][thread], now) + draw.normal(1, 0.05)
                end = max(end, free[actor][thread])
            heapq.heappush(ends, (end, actor, size))

    for actor in range(actors):
        begin(actor, 0)
        begin(actor, 0)
    times, done = [], []
    while ends:
        now, actor, size = heapq.heappop(ends)
        times.append(now)
        done.append(size)
        begin(actor, now)
    told = [times[min(len(times), (i // burst + 1) * burst) - 1] for i in range(len(times))]
    return list(zip(told, np.cumsum(done).tolist(), strict=True))


def test_the_steady_rate_leaves_the_start_and_the_end_out(tmp_path, monkeypatch):
    seconds = [30, 30.5, 32, 34, 36, 38, 40, 42, 60, 90]
    event = finished(tmp_path, seconds, monkeypatch)
    assert event["steady_images_per_s"] == pytest.approx(3 * 40 / (7.5 + 8 + 8), abs=1e-3)
    assert event["images_per_s"] == pytest.approx(100 / 90, abs=1e-3)


def test_a_few_units_have_no_steady_rate(tmp_path, monkeypatch):
    seconds = [5.0, 6, 7, 8, 9, 10, 11, 12]
    assert finished(tmp_path, seconds, monkeypatch)["steady_images_per_s"] is None
    assert finished(tmp_path, [*seconds, 13], monkeypatch)["steady_images_per_s"] == 10


def test_units_that_end_at_one_moment_have_no_steady_rate():
    assert steady_rate([(1.0, count) for count in range(20)], at_once=2) is None


@pytest.mark.parametrize("bursts", [1, 2], ids=["spread", "bunched"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("actors", "units"), [(1, 16), (1, 32), (2, 32)])
def test_the_steady_rate_is_the_true_one_within_half_a_percent_however_units_end(
    actors, units, threads, bursts
):
    """The mean over runs, the bias, within 0.5 %; nine of ten single runs within 2 %."""
    at_once = 2 * actors
    burst = at_once if bursts == 2 else 1
    found = [
        steady_rate(
            simulated(units, actors=actors, threads=threads, burst=burst, seed=seed),
            at_once=at_once,
        )
        for seed in range(SEEDS)
    ]
    errors = np.array(found) / (actors * threads) - 1
    assert abs(errors.mean()) < 0.005
    assert np.quantile(np.abs(errors), 0.9) < 0.02


@pytest.mark.parametrize(("actors", "units"), [(1, 8), (2, 8), (2, 16)])
def test_a_simulated_stage_of_too_few_units_is_refused(actors, units):
    receipts = simulated(units, actors=actors, threads=1, burst=1, seed=0)
    assert len(receipts) == units
    assert steady_rate(receipts, at_once=2 * actors) is None

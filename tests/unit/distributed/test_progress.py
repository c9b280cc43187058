"""The rates that a stage reports."""

import json
from pathlib import Path

import pytest

from stego_core.distributed import progress
from stego_core.storage.run import RunDirectory


def finished(folder: Path, seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> dict:
    """The `done` event of a stage of 10-image units that are done at these seconds."""
    clock = iter([100.0, *(100.0 + s for s in seconds), 100.0 + seconds[-1]])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    run = RunDirectory.__new__(RunDirectory)
    monkeypatch.setattr(RunDirectory, "count", lambda *_, **__: None)
    monkeypatch.setattr(RunDirectory, "status", lambda *_, **__: None)
    events = []
    monkeypatch.setattr(RunDirectory, "event", lambda _, name, **values: events.append(values))
    stage = progress.Progress(run, stage="segment", total=10 * len(seconds))
    for _ in seconds:
        stage.add({"ok": 10})
    stage.finish()
    (event,) = events
    return json.loads(json.dumps(event))


def test_the_steady_rate_leaves_the_start_of_the_actors_out(tmp_path, monkeypatch):
    event = finished(tmp_path, [30, 30.5, 32, 34, 36, 38, 40], monkeypatch)
    assert event["steady_images_per_s"] == pytest.approx(5)
    assert event["images_per_s"] == pytest.approx(70 / 40, abs=1e-3)


def test_a_few_units_have_no_steady_rate(tmp_path, monkeypatch):
    assert finished(tmp_path, [5, 6, 7, 8, 9], monkeypatch)["steady_images_per_s"] is None

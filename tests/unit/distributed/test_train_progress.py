"""What the driver tells of a training, from the events that its workers append."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from pathlib import Path

import pytest

from stego_core.distributed import train_progress
from stego_core.distributed.train_progress import TrainingLines, WorkerEvents, events_name, follow
from stego_core.storage import fs
from stego_core.storage.lease import Lease
from stego_core.storage.run import RunDirectory


def step(number: int, **values) -> dict:
    told = {"event": "train/step", "step": number, "throughput/steps_per_s": 2.0, "loss/total": 0.5}
    return told | values


@pytest.fixture(autouse=True)
def told_to_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another test may have set up the logging of this process."""
    monkeypatch.setattr(logging.getLogger("stego_core"), "propagate", True)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path), job="train")


def append(run: RunDirectory, text: str) -> None:
    with Path(run.path("events.jsonl")).open("a") as stream:
        stream.write(text)


def test_events_are_read_once_and_only_when_their_line_is_whole(run):
    run.event("of an earlier run")
    told = WorkerEvents(run.uri)
    assert told.new() == []
    append(run, '{"event": "a"}\n{"event": "b"')
    assert told.new() == [{"event": "a"}]
    assert told.new() == []
    append(run, "}\n")
    assert told.new() == [{"event": "b"}]


def test_a_torn_line_hides_nothing_of_the_others(run):
    told = WorkerEvents(run.uri)
    append(run, '{"event": "a", "st\n{"event": "b"}\n')
    assert [event["event"] for event in told.new()] == ["torn", "b"]


def test_of_a_store_the_first_look_says_what_was_there_before(run, monkeypatch):
    monkeypatch.setattr(fs, "is_local", lambda uri: False)
    monkeypatch.setattr(fs, "read_if_exists", lambda uri: content)
    told, content = WorkerEvents(run.uri), b'{"event": "of an earlier run"}\n'
    assert told.new() == []
    content += b'{"event": "a"}\n{"event": "b"'
    assert told.new() == [{"event": "a"}]
    assert told.new() == []


def test_a_run_whose_file_is_not_there_yet_has_no_events(tmp_path):
    assert WorkerEvents(str(tmp_path / "none")).new() == []


def test_workers_of_a_run_in_a_store_have_a_file_of_their_own(tmp_path):
    assert events_name("s3://bucket/run") == "events-train.jsonl"
    assert events_name(str(tmp_path)) == "events.jsonl"


def test_of_many_steps_the_last_is_told_and_counted(run, caplog):
    lines = TrainingLines(run, steps=40)
    with caplog.at_level(logging.INFO):
        lines.add([step(10), step(20)])
        lines.add([step(30)])  # too soon after the line before
    (line,) = caplog.messages
    assert line == "train 20/40 (50 %)  2.0 steps/s  loss 0.5000  eta 10 s"
    status = json.loads(Path(run.path("status.json")).read_text())
    assert (status["state"], status["stage"], status["counts"]) == (
        "running",
        "train",
        {"steps": 20},
    )
    with caplog.at_level(logging.INFO):
        lines.add([step(40)])  # the last one always
    assert caplog.messages[-1].endswith("clusters and probes are fitted")


def test_what_is_written_until_the_end_of_the_block_is_told(run, caplog):
    with caplog.at_level(logging.INFO), follow(run, 5, Lease()):
        run.event("clusters/count", count=7)
        run.event("train/resumed", step=3, workers=1)
        run.event("train/step", **{k: v for k, v in step(5).items() if k != "event"})
    assert [message.split(",")[0] for message in caplog.messages[:2]] == [
        "train: 7 clusters",
        "train: going on from step 3",
    ]
    assert caplog.messages[2].startswith("train 5/5 (100 %)")


def test_a_report_that_fails_once_stops_nothing_and_goes_on(run, caplog, monkeypatch):
    failures = [OSError("away"), OSError("away")]
    whole = train_progress.WorkerEvents.new

    def new(self):
        if failures:
            raise failures.pop()
        return whole(self)

    monkeypatch.setattr(train_progress.WorkerEvents, "new", new)
    monkeypatch.setattr(train_progress, "_LOCAL_EVERY_S", 0.01)
    with caplog.at_level(logging.INFO), follow(run, 5, Lease()):
        run.event("clusters/count", count=7)
        while failures:
            time.sleep(0.01)
    assert caplog.messages == ["train: 7 clusters, chosen without labels"]


def test_after_a_failure_or_a_lost_lease_nothing_is_told(run, caplog):
    with caplog.at_level(logging.INFO):
        with suppress(ValueError), follow(run, 5, Lease()):
            run.event("train/step", **{k: v for k, v in step(5).items() if k != "event"})
            raise ValueError("of the workers")
        lost = Lease()
        lost.is_lost = True
        with follow(run, 5, lost):
            run.event("clusters/count", count=7)
    assert caplog.messages == []
    assert not Path(run.path("status.json")).exists()

"""One precision for a whole run, decided once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stego_core.distributed import precision
from stego_core.distributed.precision import settle_precision, told_precision
from stego_core.storage.run import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path), job="test")


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the probe would find; may be changed."""
    found = ["bf16"]
    monkeypatch.setattr(precision, "total", lambda _: 0)
    monkeypatch.setattr(precision, "_probe", lambda _: found[0])
    return found


def test_a_resumed_run_keeps_what_its_first_start_found(run, hardware, tmp_path):
    assert told_precision(run) == "auto"
    assert settle_precision(run, "auto") == "bf16"
    hardware[0] = "fp32"
    assert settle_precision(run, "auto") == told_precision(run) == "bf16"
    record = json.loads((tmp_path / "precision.json").read_text())
    assert record == {"asked": "auto", "precision": "bf16", "device": "cpu"}


def test_where_nothing_is_kept_it_is_found_anew(run, hardware):
    assert settle_precision(run, "auto", is_kept=False) == "bf16"
    hardware[0] = "fp32"
    assert settle_precision(run, "auto", is_kept=False) == "fp32"


def test_what_is_asked_for_counts_and_does_not_decide_later_starts(run, hardware):
    assert settle_precision(run, "fp32") == "fp32"
    assert told_precision(run) == "auto"
    assert settle_precision(run, "auto") == "bf16"


def test_to_ask_for_what_was_found_leaves_the_decision_as_it_is(run, hardware):
    assert settle_precision(run, "auto") == "bf16"
    assert settle_precision(run, "bf16") == "bf16"
    hardware[0] = "fp32"
    assert settle_precision(run, "auto") == "bf16"


def test_each_decision_is_an_event_once(run, hardware, tmp_path):
    for asked in ("auto", "auto", "fp32"):
        settle_precision(run, asked)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["asked"], e["taken"]) for e in events] == [("auto", "bf16"), ("fp32", "fp32")]

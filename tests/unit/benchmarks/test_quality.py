"""The benchmark of quality: what it runs, and what it makes of what the jobs write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import quality
from stego_core.model.segmenter import BASELINE, BASELINE_LINEAR

BASELINES = (BASELINE, BASELINE_LINEAR)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The jobs that would have run; an evaluation scores ten times its seed."""
    made: list[list[str]] = []

    def job(name: str, *flags: str) -> float:
        made.append([name, *flags])
        if name == "evaluate.py":
            out = Path(flags[flags.index("--out") + 1])
            out.mkdir(parents=True)
            seed = sum(call[0] == "train.py" for call in made) - 1
            (out / "metrics.json").write_text(json.dumps({"cluster.miou": 10.0 * seed}))
        return 2.0

    monkeypatch.setattr(quality, "job", job)
    return made


def arguments(tmp_path: Path, *, ways: bool) -> argparse.Namespace:
    return argparse.Namespace(
        data=Path("DATA"), clusters=3, runs=tmp_path, ignore=[4], score=[], seeds=3, ways=ways
    )


def test_each_seed_is_trained_and_scored_once(tmp_path: Path, calls: list[list[str]]) -> None:
    result = quality.measure(arguments(tmp_path, ways=False), ["--train.steps", "5"])
    assert [call[0] for call in calls] == ["train.py", "evaluate.py"] * 3
    assert calls[2][-4:] == ["--train.steps", "5", "--seed", "1"]
    assert "--data.ignore-classes" in calls[1]
    assert "--data.ignore-classes" not in calls[0]  # no label is looked at in training
    assert result["percent"] == {
        "cluster.miou": {"mean": 10.0, "sd": 10.0, "values": [0.0, 10.0, 20.0]}
    }
    assert result["evaluate_seconds"] == [2.0, 2.0, 2.0]


def test_each_model_is_evaluated_in_each_way(tmp_path: Path, calls: list[list[str]]) -> None:
    result = quality.measure(arguments(tmp_path, ways=True), [])
    assert [call[0] for call in calls].count("train.py") == 3
    assert list(result["percent"]) == list(quality.WAYS)
    assert result["percent"]["--crf"]["cluster.miou"]["mean"] == 10.0
    outs = [call[call.index("--out") + 1] for call in calls if call[0] == "evaluate.py"]
    assert len(set(outs)) == 12


def test_all_heads_that_an_evaluation_scores_are_kept() -> None:
    assert {key.split(".")[0] for key in quality.KEYS} == {"cluster", "linear", *BASELINES}


def test_one_seed_has_no_standard_deviation() -> None:
    assert quality.spread([3.0])["sd"] is None

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stego_core.errors import CheckpointError
from stego_core.storage.run import RunDirectory

SECRET = "wJalrXUtnFEMI/K7MDENG"


@pytest.fixture
def run(tmp_path):
    return RunDirectory(str(tmp_path / "run"), job="train")


def events(run):
    lines = Path(run.path("events.jsonl")).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_nothing_is_written_before_the_first_record(run, tmp_path):
    assert run.read_json("status.json") is None
    assert not (tmp_path / "run").exists()


def test_status_shows_state_stage_counts_and_exit_code(run):
    run.count(images=3, failed=1)
    run.status("running", stage="mine")
    first = run.read_json("status.json")
    assert (first["job"], first["state"], first["stage"]) == ("train", "running", "mine")
    assert first["counts"] == {"images": 3, "failed": 1}
    assert first["exit_code"] is None
    run.count(failed=2)
    run.status("failed", exit_code=4)
    last = run.read_json("status.json")
    assert (last["stage"], last["exit_code"]) == ("mine", 4)
    assert last["counts"] == {"images": 3, "failed": 2}
    assert last["elapsed_s"] >= 0


def test_events_are_appended_also_by_a_second_process(run):
    run.event("a", step=1, values=[1.5])
    run.event("b")
    RunDirectory(run.uri, job="mine").event("c", path="x\ny")
    found = events(run)
    assert [(e["event"], e["job"]) for e in found] == [
        ("a", "train"),
        ("b", "train"),
        ("c", "mine"),
    ]
    assert found[0]["values"] == [1.5]
    assert found[2]["path"] == "x\ny"
    assert found[0]["time"] <= found[2]["time"]


def test_events_of_a_store_that_can_not_append_keep_the_earlier_ones():
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    try:
        RunDirectory("memory://test-run", job="a").event("one")
        second = RunDirectory("memory://test-run", job="b")
        second.event("two")
        second.event("three")
        lines = memory.cat("/test-run/events.jsonl").splitlines()
        assert [json.loads(line)["event"] for line in lines] == ["one", "two", "three"]
    finally:
        memory.rm("/test-run", recursive=True)


def test_a_directory_is_claimed_once_and_recognised_afterwards(run):
    record = {"model": "m", "settings": {"sizes": (1, 2)}}
    assert run.claim(record) is False
    assert run.claim(record) is True
    assert RunDirectory(run.uri, job="x").claim(record) is True


def test_a_claim_of_other_settings_is_refused_and_names_the_keys_that_differ(run):
    run.claim({"model": "m", "alpha": 2, "old": 1})
    with pytest.raises(CheckpointError, match=r"\(alpha, new, old differ\)") as caught:
        run.claim({"model": "m", "alpha": 3, "new": 1})
    assert "\n" not in str(caught.value)
    assert run.claim({"model": "m", "alpha": 2, "old": 1}) is True


def test_a_setting_that_differs_is_named_by_its_path(run):
    run.claim({"predict": {"resolution": 320, "scales": [1.0]}, "crf": False})
    with pytest.raises(CheckpointError, match=r"\(predict.resolution differ\)"):
        run.claim({"predict": {"resolution": 224, "scales": [1.0]}, "crf": False})


def test_overwriting_replaces_the_claim(run):
    run.claim({"alpha": 2})
    assert run.claim({"alpha": 3}, overwrite=True) is False
    assert run.claim({"alpha": 3}) is True
    with pytest.raises(CheckpointError):
        run.claim({"alpha": 2})


def test_planted_secrets_reach_no_file(run, tmp_path):
    planted = {
        "aws_secret_access_key": SECRET,
        "env": {"HF_TOKEN": SECRET, "password": f"with spaces, {SECRET}"},
        "error": f'denied: token="{SECRET}" and api_key={SECRET}',
        "uri": f"https://me:{SECRET.replace('/', '')}@host/x?X-Amz-Signature={SECRET}",
        "id": "AKIAIOSFODNN7EXAMPLE",
        "nested": json.dumps({"secret": SECRET}),
    }
    run.event("failed", **planted)
    run.status("failed", **planted)
    run.write_json("other.json", planted)
    run.claim(planted)
    for path in (tmp_path / "run").iterdir():
        text = path.read_text()
        for part in (SECRET, SECRET.replace("/", ""), "AKIAIOSFODNN7EXAMPLE"):
            assert part not in text, path.name
        json.loads(text)  # still JSON
    assert events(run)[0]["uri"].startswith("https://me:***@host/x")


def test_redaction_leaves_counts_and_the_format_alone(run):
    run.event("x", tokens=256, api_key=None, secret_found=False, token_sizes=[1, 2])
    (event,) = events(run)
    assert event["tokens"] == 256
    assert event["api_key"] is None
    assert event["secret_found"] is False
    assert event["token_sizes"] == [1, 2]


def test_a_directory_claimed_with_a_secret_is_recognised_again(run):
    record = {"root": f"s3://me:{SECRET.replace('/', '')}@bucket/x"}
    assert run.claim(record) is False
    assert run.claim(record) is True


def test_old_results_are_cleared_before_the_new_claim_is_there(run):
    run.claim({"model": "a"})

    def dies():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.claim({"model": "b"}, overwrite=True, clear=dies)
    # Whoever comes next still sees whose results these are.
    assert run.read_json("fingerprint.json") == {"model": "a"}
    assert run.claim({"model": "a"}, clear=dies)
    cleared = []
    assert not run.claim({"model": "b"}, overwrite=True, clear=lambda: cleared.append(1))
    assert cleared == [1]

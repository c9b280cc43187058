"""Flags and files to jobs, jobs to TOML and to fingerprints, help and start-up."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from stego_core.config import load
from stego_core.config.method import PairConfig
from stego_core.config.schema import EvaluateJob, MineJob, SegmentJob, TrainJob

JOBS = (MineJob, TrainJob, SegmentJob, EvaluateJob)
by_name = pytest.mark.parametrize("job_type", JOBS, ids=lambda job_type: job_type.__name__)


def read(job_type, *argv):
    return load.load_job(job_type, argv, prog="job.py")


@pytest.fixture
def toml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="my.toml"):
        (tmp_path / name).write_text(text)
        return name

    return write


@by_name
def test_no_flags_give_the_defaults(job_type):
    assert read(job_type) == job_type()


@by_name
def test_the_defaults_lie_within_their_own_ranges(job_type):
    # pydantic over the whole tree, independent of how `load` goes through it.
    assert TypeAdapter(job_type).validate_python(load.to_dict(job_type())) == job_type()


def test_every_kind_of_flag_reaches_its_field():
    job = read(
        TrainJob,
        *("--data.root", "s3://bucket/x", "--train.steps=7", "--data.ignore-classes", "4", "7"),
        *("--loss.self.weight", "0.5", "--loss.knn.shift", "-0.1", "--backbone.blocks", "-2", "-1"),
        *("--loss.no-pointwise", "--loss.stabilize", "--data.limit", "3", "--head.kind", "linear"),
        *("--train.head_lr", "1e-3", "--dry-run"),
    )
    assert job.data.root == "s3://bucket/x"
    assert job.train.steps == 7
    assert job.data.ignore_classes == (4, 7)
    assert job.loss.self == PairConfig(weight=0.5, shift=0.08)
    assert job.loss.knn.shift == -0.1
    assert job.backbone.blocks == (-2, -1)
    assert (job.loss.pointwise, job.loss.stabilize, job.dry_run) == (False, True, True)
    assert job.data.limit == 3
    assert job.head.kind == "linear"
    assert job.train.head_lr == 1e-3
    assert job.clusters == TrainJob().clusters


def test_switches_of_the_segment_job_turn_on_and_off(toml):
    assert not read(SegmentJob, "--no-crf").crf
    job = read(SegmentJob, "--crf", "--flip", "--mask-size", "original")
    assert (job.crf, job.flip, job.mask_size) == (True, True, "original")
    assert not read(SegmentJob, "--config", toml("crf = true"), "--no-crf").crf


def test_the_last_of_two_equal_flags_wins():
    assert read(TrainJob, "--train.steps", "1", "--train.steps", "2").train.steps == 2


def test_an_empty_list_and_none_can_be_given_as_flags(toml):
    name = toml('[data]\nignore_classes = [1]\nlimit = 5\n[backbone]\nweights = "x"')
    job = read(
        MineJob,
        *("--config", name, "--data.ignore-classes"),
        *("--data.limit", "None", "--backbone.weights", "None"),
    )
    assert (job.data.ignore_classes, job.data.limit, job.backbone.weights) == ((), None, None)


def test_flags_win_over_later_files_over_earlier_files_over_defaults(toml):
    first = toml("seed = 1\n[train]\nsteps = 10\nbatch = 8\nlog_every = 3", "first.toml")
    second = toml("[train]\nsteps = 20\nbatch = 16", "second.toml")
    job = read(TrainJob, "--train.batch", "4", "--config", first, f"--config={second}")
    assert (job.seed, job.train.log_every, job.train.steps, job.train.batch) == (1, 3, 20, 4)
    assert read(TrainJob, "--config", second, "--config", first).train.steps == 10


def test_a_table_in_a_file_keeps_the_defaults_of_this_job_for_the_rest(toml):
    # DataConfig alone would say split = "train", and PairConfig has no defaults at all.
    assert read(EvaluateJob, "--config", toml('[data]\nroot = "x"')).data.split == "val"
    loss = read(TrainJob, "--config", toml("[loss.self]\nweight = 1")).loss
    assert loss.self == PairConfig(weight=1.0, shift=0.08)
    assert isinstance(loss.self.weight, float)


def test_validate_takes_a_nested_mapping_with_lists_or_tuples():
    for classes in ([4, 7], (4, 7)):
        job = load.validate(TrainJob, {"data": {"ignore_classes": classes}, "workers": 2})
        assert job.data.ignore_classes == (4, 7)
        assert job.workers == 2


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 3\r\n")
    assert read(MineJob, "--config", str(path)).seed == 3


CHANGED = {
    "seed": 7,
    "out": 'a "quoted"\nλ\\path\x7f',
    "max_failed": 1e-20,
    "data": {"ignore_classes": [4, 7], "limit": 5},
    "backbone": {"weights": "x.safetensors", "blocks": []},
    "store": {"max_bytes": 2**40},
    "loss": {"self": {"weight": 1, "shift": -0.1}, "stabilize": True},
}


@pytest.mark.parametrize(
    "job", [*(job_type() for job_type in JOBS), load.validate(TrainJob, CHANGED)]
)
def test_what_was_written_is_read_back_as_an_equal_job(job, tmp_path):
    path = tmp_path / "resolved.toml"
    path.write_text(load.dump_toml(job), encoding="utf-8")
    assert read(type(job), "--config", str(path)) == job


def test_the_written_settings_leave_out_none_and_how_the_job_was_called():
    text = load.dump_toml(SegmentJob(dry_run=True, debug=True, overwrite=True))
    assert text == load.dump_toml(SegmentJob())
    for name in ("dry_run", "debug", "overwrite", "limit ="):
        assert name not in text
    assert "limit = 5\n" in load.dump_toml(SegmentJob(limit=5))


def test_a_job_becomes_plain_json_and_back():
    job = load.validate(TrainJob, CHANGED)
    plain = load.to_dict(job)
    assert plain["data"]["ignore_classes"] == [4, 7]
    assert load.validate(TrainJob, json.loads(json.dumps(plain))) == job


def test_a_fingerprint_is_the_known_hash_and_ignores_the_order_of_keys():
    # printf '[{"a":1,"b":[2,null]},"x"]' | sha256sum
    assert load.fingerprint({"b": (2, None), "a": 1}, "x") == "baba85087a97c18a"
    assert load.fingerprint({"a": 1, "b": [2, None]}, "x") == "baba85087a97c18a"


def test_a_fingerprint_changes_with_every_value_and_with_the_order_of_parts():
    job = TrainJob()
    head = dataclasses.replace(job.head, dim=71)
    seen = [
        load.fingerprint(*parts)
        for parts in [(job,), (dataclasses.replace(job, head=head),), (1, 2), (2, 1), ("1", 2), ()]
    ]
    assert len(set(seen)) == len(seen)
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in seen)


@pytest.mark.parametrize(
    ("part", "error"),
    [(float("nan"), ValueError), (float("inf"), ValueError), ({1: 2}, TypeError), ({1}, TypeError)],
)
def test_what_has_no_canonical_form_has_no_fingerprint(part, error):
    with pytest.raises(error):
        load.fingerprint({"deep": [part]})


@by_name
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_goes_to_stdout_with_exit_code_0(job_type, flag, capfd):
    with pytest.raises(SystemExit) as caught:
        read(job_type, "--nonsense", flag)
    assert caught.value.code == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "usage: job.py" in out
    assert "--config FILE.toml" in out
    assert "Share of images that may fail" in out
    for internal in ("Annotated", "Gt(", "annotated_types", "stego_core", "PairConfig"):
        assert internal not in out


def test_help_begins_with_the_description_given(capsys):
    with pytest.raises(SystemExit):
        load.load_job(MineJob, ["--help"], prog="x", description="Say what it is for.")
    assert "Say what it is for." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("stego_core", "torch ray pydantic tyro numpy"),
        ("stego_core.config.schema", "torch ray pydantic tyro tomllib numpy"),
        ("stego_core.config.load", "torch ray pydantic tyro tomllib numpy"),
    ],
)
def test_importing_stays_light(module, heavy):
    code = f"import sys, {module}; print(*set('{heavy}'.split()) & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(load.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []

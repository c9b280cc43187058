"""The public flags are a promise: adding, renaming or dropping one is a decision, not an accident.

Run as a script, this file prints what belongs into tests/golden/flags.txt.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

from stego_core.config.diagnose import flag_paths, flatten
from stego_core.config.doctor import DoctorJob
from stego_core.config.load import load_job
from stego_core.config.schema import (
    ChaosJob,
    EvaluateJob,
    ExportJob,
    ImportJob,
    MineJob,
    PrepareJob,
    ReportJob,
    SegmentJob,
    TrainJob,
    TuneJob,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "flags.txt"
COMMAND = "PYTHONPATH=. python tests/unit/config/test_flags.py > tests/golden/flags.txt"
JOBS = {
    "mine": MineJob,
    "train": TrainJob,
    "tune": TuneJob,
    "segment": SegmentJob,
    "evaluate": EvaluateJob,
    "report": ReportJob,
    "prepare": PrepareJob,
    "import": ImportJob,
    "chaos": ChaosJob,
    "doctor": DoctorJob,
    "export": ExportJob,
}


def flags(job_type):
    return ["--config", *flag_paths(flatten(job_type))]


def snapshot():
    return "".join(f"{job} {flag}\n" for job, kind in JOBS.items() for flag in flags(kind))


def test_the_public_flags_are_those_of_the_snapshot():
    expected = GOLDEN.read_text().splitlines()
    actual = snapshot().splitlines()
    added = [line for line in actual if line not in expected]
    dropped = [line for line in expected if line not in actual]
    assert actual == expected, f"added {added}, dropped {dropped}; if this is meant: {COMMAND}"


def test_every_job_script_is_in_the_snapshot():
    scripts = (Path(__file__).parents[3] / "jobs").glob("*.py")
    used = [re.findall(r"import (\w+Job)$", path.read_text(), re.MULTILINE) for path in scripts]
    assert sorted(used) == sorted([kind.__name__] for kind in JOBS.values())


@pytest.mark.parametrize("job", JOBS)
def test_the_help_shows_exactly_these_flags(job, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")  # wide enough for every flag, too narrow for two columns
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        load_job(JOBS[job], ["--help"], prog="x")
    # A flag stands behind the border (a space where the output is not UTF-8), its opposite
    # behind a comma.
    rows = re.findall(
        r"^[│ ] (?:-h, )?(--[a-z]\S*?)(?:, (--\S+))?(?: .*)?$", out.getvalue(), re.MULTILINE
    )
    shown = {flag for row in rows for flag in row if flag} - {"--help"}
    assert shown | {"--config"} == set(flags(JOBS[job]))


if __name__ == "__main__":
    sys.stdout.write(snapshot())

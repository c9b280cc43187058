"""The commands of docs/datasets.md, on synthetic trees of the official layouts."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit" / "datasets"))

from official_trees import COUNTS, TREES  # noqa: E402 - found by the path above

from stego_core.config.load import load_job  # noqa: E402
from stego_core.config.schema import EvaluateJob, PrepareJob, TrainJob  # noqa: E402
from stego_core.datasets.prepare import DATASETS, plan_prepare, prepare  # noqa: E402
from stego_core.distributed.data import decoders  # noqa: E402
from stego_core.distributed.train import plan_train  # noqa: E402
from stego_core.storage.run import RunDirectory  # noqa: E402

BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "datasets.md").read_text(), re.DOTALL)
COMMANDS = [
    shlex.split(line)[1:]
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("python jobs/")
]


def commands(script):
    return [command[1:] for command in COMMANDS if command[0] == f"jobs/{script}"]


def value(command, flag):
    return command[command.index(flag) + 1]


def placed(command, tmp_path, source="SOURCE"):
    places = {"DATA": str(tmp_path / "data"), "SOURCE": str(source), "runs": str(tmp_path / "runs")}
    places["configs"] = str(ROOT / "configs")
    names = "|".join(places)
    return [re.sub(f"^({names})(?=/|$)", lambda m: places[m[1]], word) for word in command]


def prepared(name, tmp_path, *, command=None):
    (found,) = [c for c in commands("prepare_data.py") if value(c, "--dataset") == name]
    argv = placed(command or found, tmp_path, TREES[name](tmp_path / "source"))
    job = load_job(PrepareJob, argv, prog="prepare_data.py")
    lines = plan_prepare(job)
    prepare(job, RunDirectory(job.out, job="prepare_data"), decoders(job.limits))
    return job, lines


def test_every_data_set_has_its_command():
    names = [value(command, "--dataset") for command in commands("prepare_data.py")]
    assert sorted(names) == sorted(DATASETS)


@pytest.mark.parametrize("name", DATASETS)
def test_the_commands_that_prepare_work_on_a_tree_of_the_layout(name, tmp_path):
    job, lines = prepared(name, tmp_path)
    assert not [line for line in lines if line.startswith("problem")]
    assert Path(job.out).parts[-2:] == ("data", name)
    for split in COUNTS[name]:
        assert any(line.startswith(f"{split}: ") for line in lines)


@pytest.mark.parametrize(
    "command", commands("train.py"), ids=lambda c: Path(value(c, "--out")).name
)
def test_the_commands_that_train_have_a_plan_on_the_prepared_tree(command, tmp_path):
    name = Path(value(command, "--data.root")).name
    prepared(name, tmp_path)
    argv = [*placed(command, tmp_path), "--dry-run"]
    lines = plan_train(load_job(TrainJob, argv, prog="train.py"))
    images, labels = COUNTS[name]["train"]
    assert any(f"/imgs/train: {images}, labels: " in line for line in lines)
    assert f"label files: {labels}, images with one: {labels} of {images}" in lines
    assert not any(line.startswith("data: ") for line in lines)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_the_rows_of_the_issue_have_their_commands(script):
    roots = [value(command, "--data.root") for command in commands(script)]
    assert roots == [f"DATA/{n}" for n in ("cocostuff27", "cityscapes27", "potsdam3", "voc2012")]


@pytest.mark.parametrize("command", commands("evaluate.py"), ids=lambda c: value(c, "--data.root"))
def test_the_commands_that_evaluate_score_what_was_trained(command, tmp_path):
    job = load_job(EvaluateJob, placed(command, tmp_path), prog="evaluate.py")
    assert job.data.split == "val"
    trained = [value(c, "--out") for c in commands("train.py")]
    assert value(command, "--model") in trained
    is_of_paper = "voc" not in job.model
    assert (job.crf, job.flip, job.predict.resolution) == (is_of_paper, is_of_paper, 320)


def test_the_clusters_of_a_command_are_as_many_as_the_classes(tmp_path):
    for command in commands("train.py"):
        name = Path(value(command, "--data.root")).name
        job = load_job(TrainJob, placed(command, tmp_path), prog="train.py")
        assert job.clusters.count == len(DATASETS[name].class_names)

"""The commands of docs/datasets.md, on synthetic trees of the official layouts.

Those of the published rows that stand in docs/results.md and docs/operations.md are the same ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from dataset_commands import COMMANDS, HEADERS, commands, jobs_in, placed, prepared, value
from lightning_files import save_checkpoint, state_dict
from official_trees import COUNTS

from stego_core.config.load import load_job
from stego_core.config.schema import EvaluateJob, ImportJob, TrainJob
from stego_core.datasets.prepare import DATASETS
from stego_core.distributed.evaluate import plan_evaluate
from stego_core.distributed.train import plan_train
from stego_core.model import lightning_layout
from stego_core.model.lightning import import_checkpoint, plan_import
from stego_core.storage.run import RunDirectory


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
    "command", commands("train.py", *HEADERS), ids=lambda c: Path(value(c, "--out")).name
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


def outs(*scripts):
    return [value(command, "--out") for script in scripts for command in commands(script)]


def test_the_rows_of_the_issue_have_their_commands():
    roots = [f"DATA/{n}" for n in ("cocostuff27", "cityscapes27", "potsdam3", "voc2012")]
    assert [value(command, "--data.root") for command in commands("train.py")] == roots
    assert {value(command, "--data.root") for command in commands("evaluate.py")} == {*roots}
    models = [value(command, "--model") for command in commands("evaluate.py")]
    assert sorted(models) == sorted(outs("train.py", "import_checkpoint.py"))


def test_each_variant_of_a_data_set_has_its_commands_in_its_preset():
    models = {value(command, "--out") for command in HEADERS if command[0] == "jobs/train.py"}
    variants = ("cocostuff27", "cocostuff27-october", "cocostuff27-shipped")
    assert models >= {f"runs/{name}" for name in variants}


def test_the_commands_of_the_released_checkpoint_are_the_same_on_all_pages():
    released = [c for c in COMMANDS if any("released" in word for word in c)]
    assert [c[0] for c in released] == ["jobs/import_checkpoint.py", "jobs/evaluate.py"]
    for page in ("results.md", "operations.md"):
        assert [c for c in jobs_in(page) if any("released" in word for word in c)] == released


def test_the_results_have_the_commands_of_all_published_rows():
    rows = [c for c in COMMANDS if c[0] != "jobs/prepare_data.py" and "--out" in c]
    assert len(rows) == 10
    there = jobs_in("results.md")
    assert [c for c in rows if c not in there] == []


@pytest.mark.parametrize(
    "command", commands("evaluate.py", *HEADERS), ids=lambda c: value(c, "--model")
)
def test_the_commands_that_evaluate_have_a_plan_on_the_prepared_tree(command, tmp_path):
    name = Path(value(command, "--data.root")).name
    prepared(name, tmp_path)
    card = tmp_path / value(command, "--model") / "model" / "model.json"
    card.parent.mkdir(parents=True)
    card.write_text("{}")
    job = load_job(EvaluateJob, [*placed(command, tmp_path), "--dry-run"], prog="evaluate.py")
    lines = plan_evaluate(job)
    images, labels = COUNTS[name]["val"]
    assert f"model: {card.parent}" in lines
    assert any(line.endswith(f"/imgs/val: {images}") for line in lines)
    assert f"label files: {labels}, images with one: {labels} of {images}" in lines
    is_of_paper = name != "voc2012"
    assert lines[-2] == f"crf: {'dense, flip: on' if is_of_paper else 'off, flip: off'}"
    assert (job.predict.resolution, job.compat.centre_crop) == (320, is_of_paper)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [card.parts[-3]]


def test_the_command_that_imports_makes_the_model_that_is_evaluated(tmp_path, monkeypatch):
    tiny = {(64, 16): ("vit_test", "test_vit")}
    monkeypatch.setattr(lightning_layout, "ARCHITECTURES", lightning_layout.ARCHITECTURES | tiny)
    (command,) = commands("import_checkpoint.py")
    name = Path(value(command, "--checkpoint")).name
    state = state_dict("test_vit", classes=27, clusters=27)
    save_checkpoint(tmp_path / name, state, classes=27, model_type="vit_test")
    argv = placed(command, tmp_path, tmp_path)
    job = load_job(ImportJob, argv, prog="import_checkpoint.py")
    assert "clusters: 27; classes of the linear probe: 27" in plan_import(job)
    import_checkpoint(job, RunDirectory(job.out, job="import"))
    assert (tmp_path / value(command, "--out") / "model" / "model.json").exists()


def test_the_clusters_of_a_command_are_as_many_as_the_classes(tmp_path):
    for command in commands("train.py"):
        name = Path(value(command, "--data.root")).name
        job = load_job(TrainJob, placed(command, tmp_path), prog="train.py")
        assert job.clusters.count == len(DATASETS[name].class_names)

"""A second job on a run directory is refused, and what it refused to touch is untouched."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
from factories import picture, png_bytes, write_tree

from stego_core.config.base import Space
from stego_core.config.schema import (
    ChaosJob,
    ClustersConfig,
    DataConfig,
    EvaluateJob,
    MineJob,
    TrainJob,
    TuneJob,
)
from stego_core.datasets.directory import Dataset
from stego_core.distributed import evaluate as evaluate_module
from stego_core.distributed import mine
from stego_core.distributed.chaos import soak
from stego_core.distributed.chaos_targets import Segmentation
from stego_core.distributed.cluster import ActorPlan
from stego_core.distributed.evaluate import evaluate
from stego_core.distributed.mine import Mined, mine_neighbors
from stego_core.distributed.mine_record import differing_keys, replace_others
from stego_core.distributed.train import train_model
from stego_core.distributed.tune import tune_study
from stego_core.errors import CheckpointError, ClusterError
from stego_core.model.weights import ResolvedWeights
from stego_core.storage.lease import Lease, hold
from stego_core.storage.manifest import list_images, write_manifest
from stego_core.storage.run import RunDirectory

WEIGHTS = ResolvedWeights(None, "random", "0" * 64)


@pytest.fixture
def root(tmp_path):
    files = {f"imgs/train/{n}.png": png_bytes(picture(seed=n)) for n in range(3)}
    return str(write_tree(tmp_path / "data", files))


def run_soak(job, run):
    soak(job, run, jobs=None)


def jobs(root, out, model):
    common = {"out": out, "data": DataConfig(root=root)}
    study = {"space": Space({"head.dim": [8, 16]}), "clusters": ClustersConfig(count=5)}
    return {
        "mine": (mine_neighbors, MineJob(**common)),
        "train": (train_model, TrainJob(**common)),
        "tune": (tune_study, TuneJob(**common, **study)),
        "evaluate": (evaluate, EvaluateJob(**common, model=model)),
        "chaos": (run_soak, ChaosJob(out=out)),
    }


@pytest.mark.parametrize("name", ["mine", "train", "tune", "evaluate", "chaos"])
def test_a_job_whose_run_directory_another_one_holds_leaves_it_as_it_is(name, root, tmp_path):
    out = tmp_path / "run"
    Segmentation(ChaosJob(), RunDirectory(str(tmp_path), job="test"))
    function, job = jobs(root, str(out), str(tmp_path / "random-model"))[name]
    with hold(str(out)):
        before = sorted(out.rglob("*"))
        with pytest.raises(CheckpointError, match=f"another job .process {os.getpid()} on"):
            function(job, RunDirectory(str(out), job=name))
        assert sorted(out.rglob("*")) == before


def test_mining_that_lost_its_lease_does_not_go_on(root, tmp_path, monkeypatch):
    plan = ActorPlan(1, num_cpus=1, num_gpus=0, threads=1)
    monkeypatch.setattr(mine, "plan_actors", lambda *_, **__: plan)
    monkeypatch.setattr(mine, "run_units", lambda *_, **__: iter([{"statuses": {"ok": 1}}] * 3))
    manifest = write_manifest(str(tmp_path / "manifest"), list_images(root), unit_images=1)
    backbone = MineJob().backbone
    mined = Mined(
        Dataset(root, None), manifest, str(tmp_path / "store"), True, "key", WEIGHTS, backbone
    )
    run, lease = RunDirectory(str(tmp_path / "run"), job="mine"), Lease()
    mine._embed(MineJob(), run, mined, lease)
    lease.is_lost = True
    with pytest.raises(ClusterError, match="another job took this output over"):
        mine._embed(MineJob(), run, mined, lease)


def test_what_a_killed_mining_left_is_counted_as_it_is(root, tmp_path, monkeypatch):
    counted = []
    plan = ActorPlan(1, num_cpus=1, num_gpus=0, threads=1)
    monkeypatch.setattr(mine, "plan_actors", lambda *_, **__: plan)
    monkeypatch.setattr(mine, "run_units", lambda *_, **__: iter(()))
    progress = mine.Progress

    def noted(*args, done, **options):
        counted.append(done)
        return progress(*args, done=done, **options)

    monkeypatch.setattr(mine, "Progress", noted)
    manifest = write_manifest(str(tmp_path / "manifest"), list_images(root), unit_images=2)
    assert manifest.sizes() == [2, 1]  # the last unit is shorter
    store = write_tree(tmp_path, {"store/unit-00000000.parquet": b"done"}) / "store"
    mined = Mined(
        Dataset(root, None), manifest, str(store), True, "key", WEIGHTS, MineJob().backbone
    )
    mine._embed(MineJob(), RunDirectory(str(tmp_path / "run"), job="mine"), mined, Lease())
    assert counted == [2]


def test_only_features_of_other_settings_are_dropped(tmp_path):
    names = ["0123456789abcdef", "fedcba9876543210", "by-hand"]
    root = write_tree(tmp_path, {f"features/{name}/x.npy": b"x" for name in names})
    run = RunDirectory(str(root), job="mine")
    run.write_json("mine.json", {"record": told("b"), "weights": {"sha256": "0"}})
    with pytest.raises(CheckpointError, match=r"other images or settings \(data differ\): give"):
        replace_others(MineJob(), run, names[0], told(), "0")
    assert len([*(root / "features").iterdir()]) == 3
    replace_others(MineJob(overwrite=True), run, names[0], told(), "0")
    assert sorted(path.name for path in (root / "features").iterdir()) == [names[0], names[2]]
    replace_others(MineJob(), run, names[0], told(), "0")  # as after a kill


def told(data="a", **settings):
    record = {"views": {"resolution": 32, "crops": "whole"}, "data": data, "stored": True}
    return record | settings


def test_what_was_mined_from_other_images_or_settings_is_named(tmp_path):
    run = RunDirectory(str(tmp_path), job="mine")
    assert differing_keys(run, told(), "0") == []
    run.write_json("mine.json", {"record": told(), "weights": {"sha256": "0"}})
    assert differing_keys(run, told(), "0") == differing_keys(run, told()) == []
    other = told("b", views={"resolution": 64, "crops": "whole"}, stored=False)
    assert differing_keys(run, other, "1") == ["data", "stored", "views.resolution", "weights"]
    older = {key: value for key, value in told().items() if key != "stored"}
    run.write_json("mine.json", {"record": older, "weights": {"sha256": "0"}})
    assert differing_keys(run, told(stored=False), "0") == []


@pytest.mark.parametrize(
    ("name", "job"), [("metrics.json", "mine"), ("mined", "mine"), ("mine.json", "evaluate")]
)
def test_a_job_does_not_write_into_the_output_of_another(name, job, root, tmp_path):
    out = write_tree(tmp_path / "out", {name: b"{}"})
    run = RunDirectory(str(out), job=job)
    Segmentation(ChaosJob(), RunDirectory(str(tmp_path), job="test"))  # writes the model
    function, settings = jobs(root, str(out), str(tmp_path / "random-model"))[job]
    if job == "mine":
        function = partial(mine.mine, source=mine.find_images(settings), lease=Lease())
    with pytest.raises(CheckpointError, match=f"output of another job .{name}.: give another"):
        function(settings, run)
    assert (out / name).read_bytes() == b"{}"


def test_an_evaluation_that_fails_leaves_no_scores_of_an_earlier_one(tmp_path, monkeypatch):
    Segmentation(ChaosJob(), RunDirectory(str(tmp_path), job="test"))  # writes the model
    image, label = png_bytes(picture()), png_bytes(np.zeros(picture().shape[:2], np.uint8))
    data = write_tree(tmp_path / "data", {"imgs/val/0.png": image, "labels/val/0.png": label})
    earlier = ("metrics.json", "protocol.json", "metrics/images.parquet")
    out = write_tree(tmp_path / "out", dict.fromkeys((*earlier, "notes.txt"), b"{}"))

    def fail(*_):
        raise ClusterError("no nodes")

    monkeypatch.setattr(evaluate_module, "_count", fail)
    settings = {"data": DataConfig(root=str(data), split="val"), "out": str(out)}
    job = EvaluateJob(model=str(tmp_path / "random-model"), **settings)
    with pytest.raises(ClusterError, match="no nodes"):
        evaluate(job, RunDirectory(str(out), job="evaluate"))
    assert not [name for name in earlier if (out / name).exists()]
    assert (out / "notes.txt").exists()

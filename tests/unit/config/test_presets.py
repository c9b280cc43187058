"""The files in configs/: each is read by the job that it is for, and says where it comes from."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from stego_core.config.load import load_job
from stego_core.config.schema import EvaluateJob, SegmentJob, TrainJob, TuneJob
from stego_core.model.registry import registry_names

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted(CONFIGS.glob("*.toml"))
DATA_SETS = [
    "cocostuff27-vits8",
    "cocostuff27-vits8-october",
    "cocostuff27-vits8-shipped",
    "cocostuff27-vitb8",
    "cityscapes27-vitb8",
    "potsdam3-vits8",
]


def job_type(path):
    suffixes = {"-segment": SegmentJob, "-evaluate": EvaluateJob, "-tune": TuneJob}
    return next((job for end, job in suffixes.items() if path.stem.endswith(end)), TrainJob)


def read(*names, job=TrainJob):
    files = [word for name in names for word in ("--config", str(CONFIGS / f"{name}.toml"))]
    return load_job(job, files, prog="job.py")


def paper(name):
    return read("stego-paper", name)


def test_the_presets_are_there():
    assert {path.stem for path in FILES} >= {"stego-paper", "stego-paper-evaluate", *DATA_SETS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_preset_is_read_by_its_job_and_says_something(path):
    job = load_job(job_type(path), ["--config", str(path)], prog="job.py")
    assert job != job_type(path)()


@pytest.mark.parametrize("name", ["stego-paper", "stego-paper-evaluate", *DATA_SETS])
def test_a_preset_of_the_paper_is_headed_by_its_provenance(name):
    text = (CONFIGS / f"{name}.toml").read_text()
    head = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in head.splitlines())
    words = " ".join(line.lstrip("# ") for line in head.splitlines())
    for part in ("Provenance:", "Hardware:", "xpected time:", "ot run here", "python jobs/"):
        assert part in words, part
    assert re.search(r"\b[Ss]cores?\b", words)
    for file in re.findall(r"--config (\S+)", head):
        assert (CONFIGS.parent / file).exists(), file


def test_the_paper_s_presets_turn_every_switch_on():
    for job in (read("stego-paper"), read("stego-paper-evaluate", job=EvaluateJob)):
        assert all(dataclasses.asdict(job.compat).values())
        assert len(dataclasses.asdict(job.compat)) in (7, 3)


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_paper_s_way_uses_none_of_this_project_s_departures(name):
    job = paper(name)
    assert all(dataclasses.asdict(job.compat).values())
    assert (job.head.whiten, job.head.smooth) == (0, 0)
    assert not job.neighbors.exclude_own
    assert job.loss.shifts == "fixed"
    assert (job.clusters.refit, job.train.linear_refit) == ("none", False)
    assert job.train.steps == 5000
    assert (job.train.head_lr, job.train.probe_lr) == (5e-4, 5e-3)
    assert (job.loss.samples, job.loss.negatives, job.neighbors.used) == (11, 5, 7)
    assert job.backbone.name in registry_names()
    assert (job.loss.reconstruction, job.loss.alignment, job.loss.crf) == (0, 0, 0)
    assert (job.loss.energy, job.loss.local) == ("correspondence", 0)
    # stego-method.md, 7.1: fixed across data sets.
    assert (job.loss.pointwise, job.loss.zero_clamp, job.loss.stabilize) == (True, True, False)
    assert (job.loss.salience, job.loss.oracle) == (False, False)
    assert (job.views.resolution, job.views.crop_ratio) == (224, 0.5)
    assert job.train.batch == (32 if name.endswith("vitb8") else 16)  # see its header
    assert (job.head.kind, job.head.dropout) == ("nonlinear", 0.1)
    assert (job.backbone.feature, job.backbone.precision) == ("last", "fp32")
    assert job.backbone.positions == "original"
    assert (job.neighbors.stored, job.neighbors.method) == (30, "exact")
    assert (job.train.ema, job.train.select, job.train.reset_probes_at) == (0, "last", None)
    assert (job.clusters.extra, job.clusters.alpha) == (0, None)


@pytest.mark.parametrize(
    ("name", "weights", "shifts", "others"),
    [
        # Weights and shifts of self, knn and random pairs; backbone, channels, clusters, crops.
        (
            "cocostuff27-vits8",
            (0.67, 0.25, 0.63),
            (0.08, 0.02, 0.66),
            ("dino-vits8", 70, 27, "five"),
        ),
        (
            "cocostuff27-vits8-october",
            (0.67, 0.25, 0.63),
            (0.08, 0.02, 0.16),
            ("dino-vits8", 70, 27, "five"),
        ),
        (
            "cocostuff27-vits8-shipped",
            (0.67, 0.25, 0.63),
            (0.18, 0.12, 0.46),
            ("dino-vits8", 70, 27, "five"),
        ),
        (
            "cocostuff27-vitb8",
            (0.1, 1, 0.1538476246),
            (0.12, 0.2, 1),
            ("dino-vitb8", 90, 27, "five"),
        ),
        (
            "cityscapes27-vitb8",
            (1, 0.5774534831, 0.9058762625),
            (0.4582847221, 0.1754346515, 0.3136124189),
            ("dino-vitb8", 100, 27, "five"),
        ),
        (
            "potsdam3-vits8",
            (0.67, 0.25, 0.63),
            (0.08, 0.02, 0.46),
            ("dino-vits8", 70, 3, "whole"),
        ),
    ],
)
def test_the_numbers_are_those_of_the_official_configuration(name, weights, shifts, others):
    job = paper(name)
    pairs = (job.loss.self, job.loss.knn, job.loss.random)
    assert tuple(pair.weight for pair in pairs) == weights
    assert tuple(pair.shift for pair in pairs) == shifts
    assert (job.backbone.name, job.head.dim, job.clusters.count, job.views.crops) == others


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_data_set_s_preset_sets_nothing_but_what_belongs_to_the_data_set(name):
    table = tomllib.loads((CONFIGS / f"{name}.toml").read_text())
    assert table.keys() <= {"backbone", "views", "head", "loss", "train", "clusters"}
    assert table["loss"].keys() == {"self", "knn", "random"}


def test_the_two_blocks_of_vit_s_on_cocostuff_differ_in_the_shift_of_random_pairs_alone():
    newer, older = (
        tomllib.loads((CONFIGS / f"cocostuff27-vits8{end}.toml").read_text())
        for end in ("", "-october")
    )
    assert older["loss"]["random"].pop("shift") != newer["loss"]["random"].pop("shift")
    assert older == newer


def test_the_paper_s_evaluation_is_320_pixels_flipped_and_refined():
    job = read("stego-paper-evaluate", job=EvaluateJob)
    assert (job.predict.resolution, job.predict.alpha, job.flip, job.crf) == (320, 2, True, True)

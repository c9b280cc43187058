"""The concept energy in a training: its codebook, teacher and bank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import (
    FakeFeatures,
    FolderContext,
    Killed,
    random_maps,
    ring_neighbors,
    states_equal,
    train_data,
    train_job,
)

from stego_core.config.load import load_job
from stego_core.config.schema import TrainJob
from stego_core.distributed.training_data import _concepts
from stego_core.errors import ConfigError
from stego_core.loss.concept import contrast_codes
from stego_core.loss.correspondence import sample_points
from stego_core.training.concepts import ConceptEnergy, find_concepts
from stego_core.training.loop import LocalContext, train
from stego_core.training.sampler import draw_step
from stego_core.training.step import StepBatch, Trainable

CONCEPTS = torch.randn(5, 8, generator=torch.Generator().manual_seed(9))


def job_of(**settings):
    return train_job(loss={"energy": "concept"}, **settings)


def model_of(job):
    return Trainable(job, channels=8, num_classes=0, shifts={}, concepts=CONCEPTS)


def batch_of(job, step=3):
    draws = draw_step(job, step, neighbors_VN=ring_neighbors(9), channels=8)
    maps = torch.from_numpy(random_maps(9)).float()
    rows = slice(0, job.train.batch)
    return StepBatch(maps[draws.anchors], maps[draws.neighbors], draws, rows, None)


def flat(maps):
    return maps.flatten(2).transpose(1, 2)


def expected(model, batch, bank=None):
    """The energy from its parts; `bank` are earlier keys with their concepts, (Q, K) and (Q,)."""
    keep, coords = batch.draws.keep, batch.draws.coords_anchor
    code = flat(sample_points(model.head(batch.anchor, (keep[0, 0], keep[0, 1])), coords))
    teacher = model.concepts.teacher.shadow(batch.anchor, (keep[1, 0], keep[1, 1]))
    keys = flat(sample_points(teacher, coords)).flatten(0, 1)
    unit = F.normalize(CONCEPTS, dim=1)
    ids = (flat(sample_points(batch.anchor, coords)) @ unit.T).argmax(2)
    near = (unit @ unit.T)[ids][:, :, ids.flatten()]
    near.view(-1, len(keys)).fill_diagonal_(torch.nan)
    losses = [contrast_codes(code, keys, near)]
    if bank is not None:
        losses.append(contrast_codes(code, bank[0], (unit @ unit.T)[ids][:, :, bank[1]]))
    return torch.stack(losses).mean(), keys, ids.flatten()


def test_the_energy_takes_the_place_of_the_pairs():
    job = job_of()
    model, batch = model_of(job), batch_of(job)
    losses = model(batch)
    assert set(losses) == {"concept", "cluster", "total"}
    torch.testing.assert_close(losses["concept"], expected(model, batch)[0])
    torch.testing.assert_close(losses["total"], losses["cluster"] + losses["concept"])


def test_the_bank_keeps_the_keys_of_earlier_steps_and_they_count():
    job = job_of()
    model, first, second = model_of(job), batch_of(job), batch_of(job, step=4)
    model(first)
    _, keys, ids = expected(model, first)
    model.follow()
    kept = [torch.nonzero(ids == concept)[:4, 0] for concept in range(5)]
    bank = torch.cat([keys[rows] for rows in kept])
    names = torch.cat([torch.full((len(rows),), n) for n, rows in enumerate(kept)])
    found, found_names = model.concepts._banked()
    torch.testing.assert_close(found, bank)
    assert torch.equal(found_names, names)
    losses = model(second)
    torch.testing.assert_close(losses["concept"], expected(model, second, (bank, names))[0])


def test_a_full_place_of_the_bank_is_taken_by_the_newest():
    head = model_of(job_of()).head
    energy = ConceptEnergy(head, CONCEPTS)
    for step in range(6):
        energy._keys = torch.zeros(3, dtype=torch.long), torch.full((3, 6), float(step))
        energy.follow(head)
    kept, names = energy._banked()
    assert len(kept) == 16
    assert not names.any()
    assert sorted(kept[:, 0].tolist()) == [0] + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 3


@pytest.mark.parametrize("at", [3, 4])
def test_a_run_that_was_killed_ends_like_one_that_was_not(tmp_path, at):
    job, data = job_of(), train_data(concepts=CONCEPTS)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = train(job, data, FolderContext(tmp_path / "whole"), device="cpu")
    with pytest.raises(Killed):
        train(job, data, FolderContext(tmp_path / "parts", dies_at=at), device="cpu")
    resumed = train(job, data, FolderContext(tmp_path / "parts"), device="cpu")
    assert states_equal(whole, resumed)
    assert whole.concepts.get_buffer("stored").sum() > 0


def test_the_first_weights_are_those_of_other_energies():
    start, other = Trainable(train_job(), channels=8, num_classes=0, shifts={}), model_of(job_of())
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in start.state_dict().items())
    assert states_equal(other.head, other.concepts.teacher.shadow)


def planted(count, noise=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0][:4]
    owner = torch.arange(count) % 4
    return directions[owner] + noise * torch.randn(count, 8, generator=generator), owner


def test_concepts_are_of_one_planted_kind_each():
    tokens, owner = planted(96)
    concepts = find_concepts(tokens, seed=0)
    assert concepts.shape == (24, 8)
    nearest = (F.normalize(tokens, dim=1) @ concepts.T).argmax(1)
    pure = [owner[nearest == one].bincount(minlength=4).max() for one in nearest.unique()]
    assert sum(pure) >= 0.95 * len(tokens)
    assert torch.equal(concepts, find_concepts(tokens, seed=0))


def test_the_codebook_is_found_on_features_as_the_head_sees_them_and_only_when_needed():
    features = FakeFeatures(random_maps(9, seed=2))
    found = _concepts(job_of(), features, 9)
    assert found.shape == (9 * 20 // 4, 8)
    assert torch.equal(found, _concepts(job_of(), features, 9))
    features.reads.clear()
    assert _concepts(train_job(), features, 9) is None
    assert not features.reads


def test_training_makes_codes_of_like_concepts_alike():
    generator = np.random.default_rng(0)
    directions = np.linalg.qr(generator.normal(size=(8, 8)))[0][:3]
    owner = generator.integers(0, 3, (12, 2, 2)).repeat(3, 1).repeat(3, 2)
    maps = directions[owner] + 0.25 * generator.normal(size=(*owner.shape, 8))
    maps = maps.transpose(0, 3, 1, 2)
    concepts = torch.from_numpy(directions).float()
    data = train_data(
        12, features=FakeFeatures(maps), neighbors=ring_neighbors(12), concepts=concepts
    )
    gaps = []
    for steps in (0, 150):
        job = job_of(train={"steps": steps, "head_lr": 1e-2, "log_every": 150})
        head = train(job, data, LocalContext(), device="cpu").head
        with torch.no_grad():
            code = head(torch.from_numpy(maps).float())
        gaps.append(gap(code, torch.from_numpy(owner)))
    assert gaps[1] > gaps[0] + 0.1


def gap(maps, owner):
    """Mean cosine of tokens of one kind less that of tokens of two."""
    unit, names = F.normalize(flat(maps).flatten(0, 1), dim=1), owner.flatten()
    cosines, same = unit @ unit.T, names[:, None] == names
    return float(cosines[same].mean() - cosines[~same].mean())


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (["--loss.local", "0.5"], "no pairs to mix"),
        (["--loss.oracle"], "concepts are those of features"),
    ],
)
def test_options_of_pairs_are_refused(option: list[str], reason: str) -> None:
    argv = ["--loss.energy", "concept", *option]
    with pytest.raises(ConfigError, match=reason):
        load_job(TrainJob, argv, prog="x")

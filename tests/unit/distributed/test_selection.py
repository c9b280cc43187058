from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from factories import FolderContext, Killed, train_data, train_job

from stego_core.distributed.selection import Candidates, feature_channels, refined
from stego_core.inference.scoring import head_on_features
from stego_core.model.checkpoint import load_tensors
from stego_core.training.loop import train

STEPS = [0, 2, 4, 6]


def card_of(job):
    names = [f"cluster {number}" for number in range(job.clusters.total)]
    return {"head": asdict(job.head), "cluster_names": names, "training": {"steps": 6, "seed": 0}}


def run(folder, select, *, dies_at=None, rank=0):
    """A training of six steps with a checkpoint at every second; returns what it chose."""
    # Steps so large that each changes the clusters.
    job = train_job(train={"select": select, "head_lr": 0.3})
    data = train_data()
    context = FolderContext(folder / "state", dies_at=dies_at, rank=rank)
    candidates = Candidates(str(folder / "candidates"), job, data, card_of(job), context)
    model = train(job, data, context, device="cpu", visit=candidates.visitor)
    return candidates.choose(model)


def kept(folder):
    """Steps and criteria of the candidates in a folder."""
    cards = [load_tensors(str(path), "model")[1] for path in sorted(folder.glob("candidates/*"))]
    return {card["training"]["steps"]: card["criteria"] for card in cards}


@pytest.mark.parametrize("select", ["agreement", "stability", "margin"])
def test_the_candidate_with_the_best_criterion_becomes_the_model(tmp_path, select):
    tensors, card = run(tmp_path, select)
    found = kept(tmp_path)
    assert list(found) == STEPS
    values = {step: criteria[select] for step, criteria in found.items()}
    assert len(set(values.values())) > 1  # there was something to choose from
    best = max(values, key=values.get)
    assert card["training"]["steps"] == best
    expected = load_tensors(str(tmp_path / "candidates" / f"step-{best:08d}"), "model")[0]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_killed_training_chooses_the_same(tmp_path, at):
    whole, card = run(tmp_path / "whole", "agreement")
    with pytest.raises(Killed):
        run(tmp_path / "parts", "agreement", dies_at=at)
    resumed, resumed_card = run(tmp_path / "parts", "agreement")
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole")
    assert resumed_card == card
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_without_selection_the_last_state_is_the_model_and_no_candidate_is_kept(tmp_path):
    tensors, card = run(tmp_path, "last")
    assert card["training"]["steps"] == 6
    assert not (tmp_path / "candidates").exists()
    run(tmp_path / "b", "margin")
    last = load_tensors(str(tmp_path / "b" / "candidates" / "step-00000006"), "model")[0]
    assert all(torch.equal(tensors[name], last[name]) for name in tensors)


def test_other_workers_leave_no_candidates(tmp_path):
    job = train_job(train={"select": "agreement"})
    context = FolderContext(tmp_path / "state", rank=1, num_workers=2)
    candidates = Candidates(str(tmp_path / "c"), job, train_data(), card_of(job), context)
    candidates.visit(0, None)
    assert not (tmp_path / "c").exists()


def test_refining_moves_the_clusters_alone_towards_the_codes_of_the_models_own_head(tmp_path):
    job = train_job(clusters={"passes": 3, "background": 1.0, "sample": 50})
    data, context = train_data(), FolderContext(tmp_path / "state")
    candidates = Candidates(str(tmp_path / "candidates"), job, data, card_of(job), context)
    tensors, card = candidates.choose(train(job, data, context, device="cpu"))
    moved, same = refined(job, (tensors, card), data, context, device="cpu")
    assert same == card
    assert {name for name in tensors if not torch.equal(moved[name], tensors[name])} == {"clusters"}
    head = head_on_features(tensors, card, feature_channels(data))
    _, code = head.encode(data.features.read(range(len(data.features.maps))))
    unit = F.normalize(code, dim=1).transpose(0, 1).flatten(1)
    before, after = (
        float((F.normalize(one["clusters"], dim=1) @ unit).amax(0).mean())
        for one in (tensors, moved)
    )
    assert after > before

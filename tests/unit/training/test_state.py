from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from factories import random_maps, ring_neighbors, states_equal, train_job

from stego_core.config.load import load_job
from stego_core.config.method import TrainConfig
from stego_core.config.schema import TrainJob
from stego_core.errors import CheckpointError
from stego_core.storage import fs
from stego_core.training.sampler import draw_step
from stego_core.training.state import Optimizers, find_checkpoint, load_state, save_state
from stego_core.training.step import StepBatch, Trainable

JOB = train_job()


def fresh(num_classes=3, job=JOB):
    model = Trainable(job, channels=8, num_classes=num_classes, shifts={})
    return model, Optimizers(model, job.train)


def step(model, optimizers, number):
    draws = draw_step(JOB, number, neighbors_VN=ring_neighbors(9), channels=8)
    maps = torch.from_numpy(random_maps(9)).float()
    labels = None
    if model.linear_probe is not None:
        labels = (draws.pixels[..., 0] * 3).long(), draws.pixels * 2 - 1
    losses = model(
        StepBatch(maps[draws.anchors], maps[draws.neighbors], draws, slice(0, 4), labels)
    )
    optimizers.zero_grad()
    losses["total"].backward()
    optimizers.step()


@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_state_that_was_saved_and_loaded_goes_on_as_if_nothing_had_happened(
    tmp_path, num_classes
):
    model, optimizers = fresh(num_classes)
    for number in range(3):
        step(model, optimizers, number)
    save_state(str(tmp_path), model, optimizers, {"step": 3, "note": "x"})
    again, optimizers_again = fresh(num_classes)
    assert not states_equal(model, again)
    assert load_state(str(tmp_path), again, optimizers_again) == {"step": 3, "note": "x"}
    assert states_equal(model, again)
    for number in range(3, 6):
        step(model, optimizers, number)
        step(again, optimizers_again, number)
        assert states_equal(model, again)


def test_the_moments_matter_so_that_the_test_above_can_fail(tmp_path):
    model, optimizers = fresh()
    for number in range(3):
        step(model, optimizers, number)
    save_state(str(tmp_path), model, optimizers, {"step": 3})
    again, _ = fresh()
    load_state(str(tmp_path), again, fresh()[1])
    step(model, optimizers, 3)
    step(again, Optimizers(again, JOB.train), 3)
    assert not states_equal(model, again)


def test_every_parameter_has_its_moments_in_the_file_under_a_readable_name():
    model, optimizers = fresh()
    assert optimizers.tensors() == {}
    step(model, optimizers, 0)
    names = {key.rpartition(".")[0] for key in optimizers.tensors()}
    assert names == {name for name, _ in model.named_parameters()}
    moments = {key.rpartition(".")[2] for key in optimizers.tensors()}
    assert moments == {"step", "exp_avg", "exp_avg_sq"}


def test_head_and_probes_have_their_own_learning_rates():
    job = train_job(train={"head_lr": 1e-3, "probe_lr": 1e-2})
    model, optimizers = fresh(3, job)
    before = {name: value.clone() for name, value in model.named_parameters()}
    step(model, optimizers, 0)
    # The first step of Adam moves each weight with a gradient by the learning rate.
    for name, value in model.named_parameters():
        moved = (value.detach() - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-3 if name.startswith("head") else 1e-2, rel=0.05)


def test_the_optimisers_are_plain_adams_with_the_papers_numbers_under_the_papers_settings():
    preset = Path(__file__).parents[3] / "configs" / "stego-paper.toml"
    paper = load_job(TrainJob, ["--config", str(preset)], prog="test").train
    rates = {"head_lr": paper.head_lr, "probe_lr": paper.probe_lr}
    _, optimizers = fresh(3, train_job(train=rates, loss={"reconstruction": 1.0}))
    found = {}
    for part, (module, optimizer) in optimizers._parts.items():
        assert type(optimizer) is torch.optim.Adam
        (group,) = optimizer.param_groups
        assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters()]
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
        assert (group["weight_decay"], group["amsgrad"], group["maximize"]) == (0, False, False)
        found[part] = group["lr"]
    # Source: the code published with Hamilton et al. 2022; the decoder goes with the head.
    assert found == {"head": 5e-4, "decoder": 5e-4, "cluster_probe": 5e-3, "linear_probe": 5e-3}


def test_without_settings_the_head_learns_more_slowly_and_the_probes_as_in_the_paper():
    assert (TrainConfig().head_lr, TrainConfig().probe_lr) == (1e-4, 5e-3)


def test_a_state_of_other_settings_is_refused(tmp_path):
    model, optimizers = fresh()
    save_state(str(tmp_path), model, optimizers, {"step": 0})
    wider = train_job(head={"dim": 7})
    with pytest.raises(CheckpointError, match="other settings"):
        load_state(str(tmp_path), *fresh(3, wider))
    with pytest.raises(CheckpointError, match="other settings"):
        load_state(str(tmp_path), *fresh(0))


def test_a_damaged_or_missing_state_is_refused(tmp_path):
    model, optimizers = fresh()
    with pytest.raises(CheckpointError, match="holds no state"):
        load_state(str(tmp_path), model, optimizers)
    save_state(str(tmp_path), model, optimizers, {"step": 0})
    data = (tmp_path / "state.safetensors").read_bytes()
    (tmp_path / "state.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="can't be read"):
        load_state(str(tmp_path), model, optimizers)


def test_the_files_are_plain_tensors_and_plain_json(tmp_path):
    model, optimizers = fresh()
    step(model, optimizers, 0)
    save_state(str(tmp_path), model, optimizers, {"step": 1})
    assert json.loads((tmp_path / "state.json").read_text()) == {"step": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.json", "state.safetensors"]


def test_the_newest_whole_checkpoint_of_all_starts_is_found(tmp_path):
    assert find_checkpoint(str(tmp_path / "none")) is None
    model, optimizers = fresh()
    for start, number in (("start-000", 20), ("start-001", 30), ("start-001", 40)):
        folder = tmp_path / start / f"step-{number:08d}"
        save_state(str(folder), model, optimizers, {"step": number})
    (tmp_path / "start-000" / "checkpoint_manager_snapshot.json").write_text("{")
    newest = tmp_path / "start-001" / "step-00000040"
    assert find_checkpoint(str(tmp_path)) == str(newest)
    tensors = newest / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])  # a kill in the middle of the copy
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "start-001" / "step-00000030")
    (tmp_path / "start-001" / "step-00000030" / "state.json").unlink()
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "start-000" / "step-00000020")


def test_a_store_in_trouble_has_no_damaged_checkpoint(monkeypatch):
    """Else a training that is restarted in that moment would begin anew."""
    root = "memory://state-tests/starts"
    for number in (20, 40):
        model, optimizers = fresh()
        save_state(fs.join(root, "start-000", f"step-{number:08d}"), model, optimizers, {})
    newest = fs.join(root, "start-000", "step-00000040")
    assert find_checkpoint(root) == newest
    read = fs.read_bytes

    def fail(uri):
        if "00000040" in uri:
            raise OSError("AWS Error SLOW_DOWN during GetObject operation")
        return read(uri)

    monkeypatch.setattr(fs, "read_bytes", fail)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        find_checkpoint(root)
    monkeypatch.undo()
    fs.delete("memory://state-tests")


def test_moments_are_where_their_parameters_are():
    model, optimizers = fresh()
    step(model, optimizers, 0)
    moments = optimizers.tensors()
    elsewhere = Trainable(JOB, channels=8, num_classes=3, shifts={}).to("meta")
    again = Optimizers(elsewhere, JOB.train)
    again.load(moments)
    devices = {
        name.rpartition(".")[2]: value.device.type for name, value in again.tensors().items()
    }
    assert devices == {"exp_avg": "meta", "exp_avg_sq": "meta", "step": "cpu"}

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from factories import FakeFeatures, FolderContext, Killed, random_maps, states_equal, train_data
from factories import train_job as job_of

from stego_core.training.loop import LocalContext, train


def run(folder, *, labels=True, dies_at=None, data=None, **sections):
    folder.mkdir(exist_ok=True)
    context = FolderContext(folder, dies_at=dies_at)
    data = train_data(labels=labels) if data is None else data
    return train(job_of(**sections), data, context, device="cpu"), context


def killed(folder, at, **options):
    with pytest.raises(Killed):
        run(folder, dies_at=at, **options)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_run_that_was_killed_ends_with_the_weights_of_one_that_was_not(tmp_path, at, labels):
    whole, _ = run(tmp_path / "whole", labels=labels)
    killed(tmp_path / "parts", at, labels=labels)
    resumed, context = run(tmp_path / "parts", labels=labels)
    assert states_equal(whole, resumed)
    steps = [event["step"] for event in context.events if event["event"] == "train/step"]
    # Checkpoints are made every two steps, after the event of the step.
    assert steps == list(range((at - 1) // 2 * 2 + 1, 7))


def test_a_run_that_was_killed_twice_ends_with_the_same_weights_too(tmp_path):
    whole, _ = run(tmp_path / "whole")
    killed(tmp_path / "parts", 3)
    killed(tmp_path / "parts", 5)
    assert states_equal(whole, run(tmp_path / "parts")[0])


def test_a_finished_run_is_not_trained_further(tmp_path):
    first, _ = run(tmp_path / "a")
    again, context = run(tmp_path / "a")
    assert states_equal(first, again)
    assert [event["event"] for event in context.events] == ["train/resumed"]


def test_other_things_happening_in_between_do_not_change_the_run(tmp_path):
    first, _ = run(tmp_path / "a")
    torch.manual_seed(77)
    torch.rand(5)
    assert states_equal(first, run(tmp_path / "b")[0])
    assert not states_equal(first, run(tmp_path / "c", seed=1)[0])


def test_checkpoints_are_made_at_their_interval_and_at_the_end(tmp_path):
    run(tmp_path / "a", train={"steps": 5, "checkpoint_every": 2})
    found = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert found == ["step-00000002", "step-00000004", "step-00000005"]


def test_events_come_at_their_interval_and_at_the_end_with_all_losses(tmp_path):
    _, context = run(tmp_path / "a", train={"steps": 5, "log_every": 2})
    events = [event for event in context.events if event["event"] == "train/step"]
    assert [event["step"] for event in events] == [2, 4, 5]
    names = {"loss/total", "loss/self", "loss/knn", "loss/random", "loss/cluster", "loss/linear"}
    names |= {
        "correspondence/self",
        "correspondence/knn",
        "correspondence/random",
        "throughput/steps_per_s",
    }
    assert names == set(events[0]) - {"event", "step", "batch"}


def test_a_probe_that_is_fitted_afterwards_is_not_trained_and_no_step_reads_a_label(tmp_path):
    class Unread:
        def read(self, *_):
            pytest.fail("a step read labels")

    data = replace(train_data(labels=True), labels=Unread())
    model, context = run(tmp_path / "a", data=data, train={"linear_refit": True})
    trained, _ = run(tmp_path / "b", train={"linear_refit": False})
    events = [event for event in context.events if event["event"] == "train/step"]
    assert len(events) == 6
    assert all("loss/linear" not in event for event in events)
    assert states_equal(model.head, trained.head)
    assert states_equal(model.cluster_probe, trained.cluster_probe)
    assert not states_equal(model.linear_probe, trained.linear_probe)
    assert states_equal(model, run(tmp_path / "a", data=data, train={"linear_refit": True})[0])


def test_no_steps_give_the_initial_weights(tmp_path):
    model, context = run(tmp_path / "a", train={"steps": 0})
    other, _ = run(tmp_path / "b", train={"steps": 1})
    assert context.events == []
    assert not states_equal(model, other)
    assert not model.training


def test_training_lowers_the_loss_that_it_minimises():
    context = LocalContext()
    maps = random_maps(6, channels=8) + 4 * random_maps(6, channels=8, height=1, width=1, seed=1)
    data = train_data(6, features=FakeFeatures(maps), labels=True)
    train(job_of(train={"steps": 120, "log_every": 1}), data, context, device="cpu")
    totals = [event["loss/total"] for event in context.events]
    assert sum(totals[-20:]) < sum(totals[:20])


def test_only_the_views_of_the_batch_are_read(tmp_path):
    data = train_data(9)
    run(tmp_path / "a", data=data, train={"steps": 2})
    reads = data.features.reads
    assert [len(read) for read in reads] == [4, 4, 4, 4]  # anchors and neighbours of two steps
    assert len({*reads[0], *reads[2]}) == 8

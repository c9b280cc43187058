from __future__ import annotations

import pytest
import torch
from factories import train_data, train_job

from stego_core.training import speed
from stego_core.training.calibration import calibrate
from stego_core.training.fit import fit
from stego_core.training.loop import LocalContext, train
from stego_core.training.speed import seconds_per_step, views_read


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"head": {"whiten": 4}},
        {"head": {"kind": "transformer"}},
        {"loss": {"alignment": 1.0}},
        {"loss": {"energy": "smooth"}},
        {"loss": {"energy": "concept"}},
        {"clusters": {"count": 0}},
    ],
)
def test_the_time_of_a_step_is_measured_whatever_the_settings_are(settings):
    threads = torch.get_num_threads()
    assert seconds_per_step(train_job(**settings), width=8, grid=5) > 0
    assert torch.get_num_threads() == threads


def test_batches_that_would_take_much_memory_are_not_tried(monkeypatch):
    monkeypatch.setattr(speed, "_LARGEST_BYTES", 1000)
    assert seconds_per_step(train_job(), width=8, grid=5) is None


def test_the_views_that_are_read_are_those_of_calibration_steps_and_fit():
    job, data = train_job(clusters={"sample": 10_000}, head={"whiten": 0}), train_data(9)
    calibrate(data.features, data.neighbors, seed=0)
    fit(job, train(job, data, LocalContext(), device="cpu"), data)
    read = sum(map(len, data.features.reads))
    # A read of one view tells the fit how many cells there are.
    assert read == views_read(job, 9) + 1
    more = views_read(train_job(clusters={"sample": 10_000}, head={"whiten": 4}), 9)
    assert more == read - 1 + 3 * 9

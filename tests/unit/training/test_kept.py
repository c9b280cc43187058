"""Features that a training keeps between steps are those that it would compute again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import (
    FakeFeatures,
    FolderContext,
    Killed,
    random_maps,
    states_equal,
    train_data,
    train_job,
)

from stego_core.model.whitening import fit_whitening
from stego_core.training.kept import SeenFeatures
from stego_core.training.loop import train
from stego_core.training.views import FromStore

CHANNELS, SIDE, DIM = 8, 5, 4
VIEW_BYTES = DIM * SIDE * SIDE * 4


class Store:
    """As `StoredFeatures` reads: (B, h, w, C); remembers which views were read."""

    def __init__(self, maps: np.ndarray) -> None:
        self._maps, self.reads = maps.astype(np.float32), []

    def read(self, views: np.ndarray) -> np.ndarray:
        self.reads += [int(view) for view in views]
        return np.ascontiguousarray(self._maps[views].transpose(0, 2, 3, 1))


@pytest.fixture
def maps() -> np.ndarray:
    return random_maps(9, CHANNELS, SIDE, SIDE)


@pytest.fixture
def whiten(maps):
    tokens = torch.from_numpy(maps).float().permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    return fit_whitening(tokens, DIM)


# A convolution of 17 views of 768 channels has other bits than one of a part of them.
@pytest.mark.parametrize(("channels", "batch"), [(8, 3), (384, 16), (768, 17)])
@pytest.mark.parametrize("room", [3, 100])
def test_what_is_read_has_the_same_bits_whatever_is_kept(channels, batch, room):
    maps = random_maps(40, channels, SIDE, SIDE)
    tokens = torch.from_numpy(maps).float().permute(0, 2, 3, 1).reshape(-1, channels)
    whitening, store = fit_whitening(tokens, DIM), Store(maps)
    limits = {"device": "cpu", "max_bytes": room * VIEW_BYTES}
    seen = SeenFeatures(FromStore(store), whitening, **limits)
    generator = np.random.default_rng(0)
    for number in range(6):
        views = generator.integers(0, 40, batch)
        fresh = SeenFeatures(FakeFeatures(maps), whitening, device="cpu").read(views)
        found = seen.read(views)
        assert torch.equal(found, fresh), number
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert not found.requires_grad
        plain = whitening(torch.from_numpy(maps[views]).float())
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    assert len(store.reads) < 6 * batch


def test_without_whitening_nothing_is_kept(maps):
    store = Store(maps)
    seen = SeenFeatures(FromStore(store), None, device="cpu")
    for _ in range(2):
        assert torch.equal(seen.read(np.array([0, 2])), torch.from_numpy(maps[[0, 2]]).float())
    assert store.reads == [0, 2, 0, 2]


def test_a_view_is_read_once_while_there_is_room_and_then_the_first_ones_stay(maps, whiten):
    store = Store(maps)
    seen = SeenFeatures(FromStore(store), whiten, device="cpu", max_bytes=2 * VIEW_BYTES + 1)
    for _ in range(3):
        for views in ([0, 1], [2, 3]):
            seen.read(np.array(views))
    assert store.reads == [0, 1, 2, 3, 2, 3, 2, 3]


def test_a_source_that_computes_ahead_is_read_every_time(maps, whiten):
    source = FakeFeatures(maps)
    seen = SeenFeatures(source, whiten, device="cpu")
    reads = [np.array([0, 1]), np.array([1, 0])]
    seen.expect(reads)
    for views in reads:
        seen.read(views)
    assert source.reads == [[0, 1], [1, 0]]


def test_a_killed_training_on_kept_features_ends_with_the_weights_of_one_that_was_not(tmp_path):
    channels, count = 768, 40
    maps = random_maps(count, channels, SIDE, SIDE)
    tokens = torch.from_numpy(maps).float().permute(0, 2, 3, 1).reshape(-1, channels)
    whitening = fit_whitening(tokens, DIM)
    job = train_job(train={"batch": 16, "steps": 8}, head={"whiten": DIM})

    def run(name, features, *, dies_at=None):
        (tmp_path / name).mkdir(exist_ok=True)
        context = FolderContext(tmp_path / name, dies_at=dies_at)
        data = train_data(count, features=features, channels=DIM, whitening=whitening)
        return train(job, data, context, device="cpu")

    whole = run("whole", FromStore(Store(maps)))
    with pytest.raises(Killed):
        run("parts", FromStore(Store(maps)), dies_at=5)
    assert states_equal(whole, run("parts", FromStore(Store(maps))))
    assert states_equal(whole, run("streamed", FakeFeatures(maps)))

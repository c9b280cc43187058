"""Features that a training keeps between steps are those that it would compute again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import FakeFeatures, random_maps

from stego_core.model.whitening import fit_whitening
from stego_core.training.kept import SeenFeatures
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


@pytest.mark.parametrize("room", [0, 3, 100])
def test_what_is_read_is_the_same_whatever_is_kept(maps, whiten, room):
    store = Store(maps)
    seen = SeenFeatures(FromStore(store), whiten, device="cpu", max_bytes=room * VIEW_BYTES)
    for views in ([4, 0, 4], [1, 0, 8], [4, 1, 2], [4, 1, 0]):
        wanted = whiten(torch.from_numpy(maps).float()[views])
        found = seen.read(np.array(views))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert not found.requires_grad
    assert (len(store.reads) == 12) == (room == 0)


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

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import random_maps

from stego_core.errors import ShapeError
from stego_core.loss.correspondence import sample_points
from stego_core.loss.salience import one_hot_labels, salient_points

SAMPLES = 40


def uniform(batch=2, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coords = torch.rand(batch, SAMPLES, SAMPLES, 2, generator=generator, dtype=torch.float64)
    draws = torch.rand(2, batch, SAMPLES, SAMPLES, generator=generator, dtype=torch.float64)
    return coords * 2 - 1, draws


def pixel_of(coords, size, grid):
    """The pixel (row, column) under points given on the grid's scale."""
    x, y = coords.unbind(-1)
    place = [(v + 1) / 2 * (cells - 1) + 0.5 for v, cells in ((y, grid[0]), (x, grid[1]))]
    return [(p / cells * s).floor().long() for p, cells, s in zip(place, grid, size, strict=True)]


def test_moved_points_are_centres_of_pixels_of_the_mask_and_the_others_stay():
    coords, draws = uniform()
    mask = torch.zeros(2, 12, 16, dtype=torch.bool)
    mask[0, 3:5, 6:9], mask[1, 8, 2:14] = True, True
    found = salient_points(coords, mask, draws, grid=(6, 8))
    moved = draws[0] < 0.9
    assert torch.equal(found[~moved], coords[~moved])
    for image in range(2):
        rows, columns = pixel_of(found[image][moved[image]], (12, 16), (6, 8))
        assert mask[image][rows, columns].all()
        # Every pixel of the mask is drawn: 1440 draws from at most 12.
        hit = {*zip(rows.tolist(), columns.tolist(), strict=True)}
        assert hit == {tuple(pixel) for pixel in mask[image].nonzero().tolist()}


def test_nine_in_ten_points_are_moved():
    coords, draws = uniform(batch=8)
    mask = torch.zeros(8, 8, 8, dtype=torch.bool)
    mask[:, 4, 4] = True
    same = (salient_points(coords, mask, draws, grid=(8, 8)) == coords).all(-1)
    # 12 800 draws: the standard error is 0.0027.
    assert same.double().mean().item() == pytest.approx(0.1, abs=0.015)


def test_an_image_without_any_pixel_in_the_mask_keeps_its_points():
    coords, draws = uniform()
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[1, 0, 0] = True
    found = salient_points(coords, mask, draws, grid=(4, 4))
    assert torch.equal(found[0], coords[0])
    assert not torch.equal(found[1], coords[1])


def test_sampling_at_a_moved_point_reads_the_cell_that_shows_the_pixel():
    # One pixel per cell: a point on a pixel's centre reads exactly its cell.
    maps = torch.from_numpy(random_maps(1, height=6, width=6))
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    mask[0, 1, 4] = True
    coords, draws = uniform(batch=1)
    found = salient_points(coords, mask, draws, grid=(6, 6))
    values = sample_points(maps, found)
    moved = (draws[0, 0] < 0.9).T  # sampling swaps the two axes of the points
    expected = maps[0, :, 1, 4, None].expand(-1, int(moved.sum()))
    torch.testing.assert_close(values[0][:, moved], expected)


def test_points_never_leave_the_map():
    coords, draws = uniform()
    found = salient_points(coords, torch.ones(2, 9, 9, dtype=torch.bool), draws, grid=(1, 3))
    assert found.abs().max() <= 1


def test_shapes_that_do_not_fit_are_refused():
    coords, draws = uniform()
    with pytest.raises(ShapeError):
        salient_points(coords, torch.ones(1, 9, 9, dtype=torch.bool), draws, grid=(3, 3))
    with pytest.raises(ShapeError):
        salient_points(coords, torch.ones(2, 9, 9, dtype=torch.bool), draws[:1], grid=(3, 3))


def test_labels_become_one_hot_vectors_of_label_plus_one():
    labels = torch.tensor([[[0, 2], [255, 3]], [[-1, 1], [1, 0]]])
    found = one_hot_labels(labels, 3)
    assert found.shape == (2, 4, 2, 2)
    assert found.dtype == torch.float32
    expected = np.array([[[1, 3], [0, 0]], [[0, 2], [2, 1]]])
    np.testing.assert_array_equal(found.argmax(1).numpy(), expected)
    assert (found.sum(1) == 1).all()

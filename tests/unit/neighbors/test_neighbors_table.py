from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from factories import make_views

from stego_core.errors import SchemaError
from stego_core.neighbors.search import NONE, exact_top_k
from stego_core.neighbors.table import neighbor_indices, read_table, write_part


@pytest.fixture
def views():
    return make_views(7, crops=3)


def search(views, k):
    rows, groups = torch.from_numpy(views.embeddings), torch.from_numpy(views.image_ids)
    scores, indices = exact_top_k(rows, rows, k, query_groups_Q=groups, gallery_groups_G=groups)
    return scores.numpy(), indices.numpy()


def write(folder, views, k, *, cuts=(0, 8, 21), key="key"):
    scores, indices = search(views, k)
    for start, end in itertools.pairwise(cuts):
        part = slice(start, end)
        uri = f"{folder}/part-{start:05d}.parquet"
        write_part(uri, views, part, scores[part], indices[part], key=key)
    return scores, indices


@pytest.mark.parametrize("used", [1, 5, 18, 25])
def test_the_table_leads_back_to_the_views_that_the_search_found(views, tmp_path, used):
    _, indices = write(tmp_path, views, 18)
    found = neighbor_indices(read_table(str(tmp_path), key="key"), views, used)
    assert found.dtype == np.int64
    assert found.shape == (21, used)
    np.testing.assert_array_equal(found[:, : min(used, 18)], indices[:, :used])
    assert (found[:, 18:] == NONE).all()


def test_a_row_tells_ids_and_crops_nearest_first(views, tmp_path):
    scores, indices = write(tmp_path, views, 4)
    row = read_table(str(tmp_path), key="key").to_pylist()[10]
    assert (row["image_id"], row["crop"]) == (views.image_ids[10], views.crops[10])
    assert row["neighbor_ids"] == views.image_ids[indices[10]].tolist()
    assert row["neighbor_crops"] == views.crops[indices[10]].tolist()
    assert row["scores"] == scores[10].tolist()
    assert row["scores"] == sorted(row["scores"], reverse=True)
    assert row["image_id"] not in row["neighbor_ids"]


def test_missing_neighbours_shorten_the_lists(tmp_path):
    views = make_views(2, crops=2)
    write(tmp_path, views, 30, cuts=(0, 4))
    table = read_table(str(tmp_path), key="key")
    assert [len(row) for row in table["neighbor_ids"].to_pylist()] == [2] * 4
    found = neighbor_indices(table, views, 3)
    assert (found[:, 2] == NONE).all()
    assert {*found[0, :2].tolist()} == {2, 3}


def test_a_single_image_has_empty_lists(tmp_path):
    views = make_views(1)
    write(tmp_path, views, 30, cuts=(0, 1))
    table = read_table(str(tmp_path), key="key")
    assert table["neighbor_ids"].to_pylist() == [[]]
    assert neighbor_indices(table, views, 2).tolist() == [[NONE, NONE]]


def test_the_order_of_the_rows_does_not_matter(views, tmp_path):
    _, indices = write(tmp_path, views, 6)
    table = read_table(str(tmp_path), key="key")
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    np.testing.assert_array_equal(neighbor_indices(shuffled, views, 6), indices)


def test_a_table_of_other_views_is_refused(views, tmp_path):
    write(tmp_path, views, 4)
    table = read_table(str(tmp_path), key="key")
    for other in (table.slice(0, 20), table.slice(0, 0)):  # a part is lost
        with pytest.raises(SchemaError, match="of other views; run mine_neighbors again"):
            neighbor_indices(other, views, 4)
    for change in ({"image_ids": views.image_ids + 1}, {"crops": views.crops + 1}):
        with pytest.raises(SchemaError, match="of other views"):
            neighbor_indices(table, replace(views, **change), 4)


def test_a_table_of_another_key_is_refused(views, tmp_path):
    write(tmp_path, views, 4)
    with pytest.raises(SchemaError, match=r"part-00000\.parquet is stale"):
        read_table(str(tmp_path), key="other")


def test_one_stale_file_among_others_is_refused(views, tmp_path):
    scores, indices = write(tmp_path, views, 4)
    part = slice(8, 21)
    uri = f"{tmp_path}/part-00008.parquet"
    write_part(uri, views, part, scores[part], indices[part], key="older")
    with pytest.raises(SchemaError, match=r"part-00008\.parquet is stale"):
        read_table(str(tmp_path), key="key")


def test_a_folder_without_a_table_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SchemaError, match="holds no neighbours"):
        read_table(str(tmp_path), key="key")


def test_the_same_neighbours_give_the_same_bytes(views, tmp_path):
    write(tmp_path / "a", views, 4, cuts=(0, 21))
    write(tmp_path / "b", views, 4, cuts=(0, 21))
    first, second = (tmp_path / x / "part-00000.parquet" for x in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert pq.read_schema(first).metadata[b"stego.schema"] == b"neighbors/1"

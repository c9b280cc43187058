from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from stego_core.errors import ImageProblem
from stego_core.storage.feature_store import (
    SCHEMA,
    StoredFeatures,
    read_views,
    unit_names,
    write_unit,
)

SHAPE = (3, 2, 5)


def rows(*images, dim=5):
    """One row per view of (image_id, crops), one per failure of (image_id, problem)."""
    found = []
    for image_id, what in images:
        if isinstance(what, ImageProblem):
            values = {"crop": 0, "status": what.value, "detail": "why", "embedding": None}
            found.append({"image_id": image_id, **values})
            continue
        for crop in range(what):
            embedding = [float(image_id + crop)] * dim
            values = {"crop": crop, "status": "ok", "detail": None, "embedding": embedding}
            found.append({"image_id": image_id, **values})
    return pa.Table.from_pylist(found, schema=SCHEMA)


@pytest.fixture
def store(tmp_path):
    """Three units: four views and a failure; no usable image; one view."""
    maps = np.random.default_rng(0).normal(size=(5, *SHAPE)).astype(np.float16)
    folder = str(tmp_path / "features")
    write_unit(folder, 0, rows((7, 2), (5, ImageProblem.EMPTY), (6, 2)), maps[:4])
    write_unit(folder, 1, rows((9, ImageProblem.TRUNCATED)), None)
    write_unit(folder, 2, rows((1, 1)), maps[4:])
    return folder, maps


def test_views_come_in_manifest_order_with_the_failures_apart(store):
    views = read_views(store[0], 3)
    assert views.image_ids.tolist() == [7, 7, 6, 6, 1]
    assert views.crops.tolist() == [0, 1, 0, 1, 0]
    assert views.embeddings.dtype == np.float32
    assert views.embeddings[:, 0].tolist() == [7, 8, 6, 7, 1]
    assert views.failures == [(5, "empty", "why"), (9, "truncated", "why")]


def test_features_are_those_that_were_written_view_by_view(store):
    folder, maps = store
    stored = StoredFeatures(folder, 3)
    assert len(stored) == 5
    assert stored.shape == SHAPE
    for view in range(5):
        read = stored.read(np.array([view]))
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read[0], maps[view].astype(np.float32))


def test_views_are_read_in_the_order_asked_for_and_as_often(store):
    folder, maps = store
    order = np.array([4, 0, 3, 3, 4, 1])
    read = StoredFeatures(folder, 3).read(order)
    np.testing.assert_array_equal(read, maps[order].astype(np.float32))


def test_units_without_a_usable_image_may_stand_anywhere(tmp_path):
    maps = np.arange(2 * 30).reshape(2, *SHAPE).astype(np.float32)
    folder = str(tmp_path)
    write_unit(folder, 0, rows((9, ImageProblem.EMPTY)), None)
    write_unit(folder, 1, rows((1, 1)), maps[:1])
    write_unit(folder, 2, rows((8, ImageProblem.EMPTY)), None)
    write_unit(folder, 3, rows((2, 1)), maps[1:])
    write_unit(folder, 4, rows((7, ImageProblem.EMPTY)), None)
    stored = StoredFeatures(folder, 5)
    np.testing.assert_array_equal(stored.read(np.array([0, 1])), maps)
    assert len(stored) == len(read_views(folder, 5).image_ids) == 2


def test_a_unit_is_mapped_when_a_view_of_it_is_read_and_not_before(store):
    stored = StoredFeatures(store[0], 3)
    assert stored.mapped == []
    stored.read(np.array([4]))
    assert stored.mapped == [2]
    stored.read(np.array([4, 1]))
    assert stored.mapped == [0, 2]
    assert all(isinstance(unit, np.memmap) and unit.mode == "r" for unit in stored._maps.values())


def test_what_was_read_may_be_changed_without_changing_the_store(store):
    folder, maps = store
    stored = StoredFeatures(folder, 3)
    stored.read(np.array([2]))[:] = 0
    np.testing.assert_array_equal(stored.read(np.array([2]))[0], maps[2].astype(np.float32))


def test_a_unit_is_complete_when_its_table_is_there(store, tmp_path):
    folder, _ = store
    assert unit_names(folder) == {0, 1, 2}
    (tmp_path / "features" / "unit-00000002.parquet").unlink()
    assert unit_names(folder) == {0, 1}
    assert unit_names(str(tmp_path / "none")) == set()


def test_the_features_are_written_before_the_table(tmp_path, monkeypatch):
    from stego_core.storage import fs

    names = []
    monkeypatch.setattr(fs, "write_bytes", lambda uri, _: names.append(uri.rpartition(".")[2]))
    write_unit(str(tmp_path), 0, rows((1, 1)), np.zeros((1, *SHAPE)))
    assert names == ["npy", "parquet"]


def test_a_store_without_a_usable_image_still_says_what_failed(tmp_path):
    write_unit(str(tmp_path), 0, rows((9, ImageProblem.EMPTY), (8, ImageProblem.EMPTY)), None)
    views = read_views(str(tmp_path), 1)
    assert len(views.image_ids) == len(views.embeddings) == 0
    assert [failure[:2] for failure in views.failures] == [(9, "empty"), (8, "empty")]


def test_units_of_a_store_elsewhere_are_copied_when_they_are_read(store):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    folder, maps = store
    memory.put(folder, "/test-store", recursive=True)
    try:
        stored = StoredFeatures("memory://test-store", 3)
        stored.read(np.array([4]))
        assert stored.mapped == [2]
        np.testing.assert_array_equal(stored.read(np.array([4, 1])), maps[[4, 1]])
        assert read_views("memory://test-store", 3).image_ids.tolist() == [7, 7, 6, 6, 1]
    finally:
        memory.rm("/test-store", recursive=True)


def test_features_of_a_job_that_died_before_its_table_do_not_count(tmp_path):
    folder = str(tmp_path)
    maps = np.ones((2, *SHAPE), np.float16)
    write_unit(folder, 0, rows((1, 2)), maps)
    (tmp_path / "unit-00000000.parquet").unlink()
    write_unit(folder, 0, rows((1, ImageProblem.READ_DENIED)), None)
    write_unit(folder, 1, rows((2, 2)), 2 * maps)
    stored = StoredFeatures(folder, 2)
    assert len(stored) == len(read_views(folder, 2).image_ids) == 2
    assert (stored.read(np.array([0, 1])) == 2).all()

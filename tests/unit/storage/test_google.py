"""Google's storage through pyarrow, against a server that speaks as it does."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from google_store import GOOGLE_BUCKET, needs_google

from stego_core.errors import InputError
from stego_core.model.checkpoint import save_tensors
from stego_core.storage import fs, uris, walk
from stego_core.storage.manifest import read_manifest, write_manifest
from stego_core.training.state import find_checkpoint

pytestmark = needs_google
ROOT = f"gs://{GOOGLE_BUCKET}"


@pytest.fixture(autouse=True)
def here(google_store, monkeypatch):
    for name, value in google_store.items():
        monkeypatch.setenv(name, value)
    uris._gcs.cache_clear()
    yield
    fs.delete(f"{ROOT}/tests")
    uris._gcs.cache_clear()


@pytest.mark.parametrize("client", ["google", "pyarrow"])
def test_all_files_are_listed_with_odd_names_and_in_folders_no_object_stands_for(
    client, monkeypatch
):
    monkeypatch.setattr(walk, "_has_google_client", lambda: client == "google")
    if client == "google":  # by pages: pyarrow would hold all names
        monkeypatch.setattr(walk, "_walk", pytest.fail)
    # In the order of whole paths: "." comes before "/", and that before "0".
    names = ["a.jpg", "a/b/d.jpg", "a/q%20?#.jpg", "a0.jpg", "ü ber.jpg"]
    for name in (*reversed(names), ".h.jpg", "a/.t/e.jpg"):
        fs.write_bytes(f"{ROOT}/tests/{name}", name.encode())
    found = list(fs.list_files(f"{ROOT}/tests"))
    assert [file.path for file in found] == names == sorted(names)
    assert [fs.read_bytes(file.uri) for file in found] == [name.encode() for name in names]
    assert [file.num_bytes for file in found] == [len(name.encode()) for name in names]
    assert fs.list_names(f"{ROOT}/tests") == [".h.jpg", "a", *(n for n in names if "/" not in n)]
    assert fs.list_names(f"{ROOT}/tests/a") == [".t", "b", "q%20?#.jpg"]
    assert fs.list_names(f"{ROOT}/tests/none") == []
    before = {file.path: file.etag for file in found}
    fs.write_bytes(f"{ROOT}/tests/a0.jpg", b"new")
    after = {file.path: file.etag for file in fs.list_files(f"{ROOT}/tests")}
    assert {path for path in before if before[path] != after[path]} == {"a0.jpg"}


def test_files_are_read_written_and_deleted():
    uri = f"{ROOT}/tests/file"
    assert not fs.exists(uri)
    assert fs.read_if_exists(uri) is None
    with pytest.raises(FileNotFoundError):
        fs.read_bytes(uri)
    fs.write_bytes(uri, b"x" * 10**6)
    assert fs.exists(uri)
    assert fs.read_bytes(uri, 3) == b"xxx"
    assert fs.is_folder(f"{ROOT}/tests")
    fs.delete(f"{ROOT}/tests")
    assert not fs.exists(uri)
    fs.delete(uri)


def test_tables_and_manifests_are_read_in_part():
    for number in range(5):
        fs.write_bytes(f"{ROOT}/tests/in/{number}.jpg", bytes(number + 1))
    files = list(fs.list_files(f"{ROOT}/tests/in"))
    write_manifest(f"{ROOT}/tests/manifest.parquet", files, unit_images=2)
    manifest = read_manifest(f"{ROOT}/tests/manifest.parquet")
    assert manifest.read_unit(1)["image_bytes"].to_pylist() == [3, 4]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": range(9)}), sink, row_group_size=2)
    fs.write_bytes(f"{ROOT}/tests/t.parquet", sink.getvalue().to_pybytes())
    assert fs.read_rows(f"{ROOT}/tests/t.parquet", 3, 4)["a"].to_pylist() == [3, 4, 5, 6]


def test_a_checkpoint_is_found_in_folders_that_no_object_stands_for():
    for step in (20, 30):
        name = f"{ROOT}/tests/train/start-000/step-{step:08d}"
        for part in ("model", "state"):
            save_tensors(name, part, {"a": torch.zeros(2)}, {})
    found = find_checkpoint(f"{ROOT}/tests/train")
    assert found is not None
    assert found.endswith("start-000/step-00000030")


@pytest.mark.parametrize("client", ["google", "pyarrow"])
@pytest.mark.parametrize("uri", ["gs://no-such-bucket", f"{ROOT}/no-such-prefix", "gs:///x"])
def test_what_is_not_there_is_told_in_one_line(uri, client, monkeypatch):
    monkeypatch.setattr(walk, "_has_google_client", lambda: client == "google")
    with pytest.raises(InputError) as caught:
        list(fs.list_files(uri))
    assert "\n" not in str(caught.value)

from __future__ import annotations

import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import write_tree

from stego_core.errors import InputError, SchemaError
from stego_core.storage.manifest import (
    image_id,
    is_image_name,
    list_images,
    read_manifest,
    write_manifest,
)

NAMES = ["b.jpg", "a/c.PNG", "a/d.webp", "e", "f.tiff", "g.jpeg", "h.bmp"]


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "images", {name: name.encode() for name in NAMES})


def written(tree, uri, **options):
    return write_manifest(str(uri), list_images(str(tree)), **{"unit_images": 3, **options})


def test_ids_are_the_same_wherever_the_tree_lies(tree, tmp_path):
    here = written(tree, tmp_path / "here.parquet").read()
    shutil.copytree(tree, tmp_path / "elsewhere" / "deeper")
    there = written(tmp_path / "elsewhere" / "deeper", tmp_path / "there.parquet").read()
    assert here["image_id"].to_pylist() == there["image_id"].to_pylist()
    assert here["image_uri"].to_pylist() != there["image_uri"].to_pylist()
    assert len(set(here["image_id"].to_pylist())) == len(NAMES)


def test_the_id_of_a_path_never_changes():
    # Written down: tables of earlier runs are joined by these.
    assert image_id("a/b.jpg") == 0x2528B1B12373E20C


def test_units_hold_the_listing_in_order(tree, tmp_path):
    made = written(tree, tmp_path / "m.parquet", unit_images=3)
    assert (made.num_images, made.num_units) == (7, 3)
    units = [made.read_unit(unit)["path"].to_pylist() for unit in range(made.num_units)]
    assert [len(unit) for unit in units] == [3, 3, 1]
    listed = [path for unit in units for path in unit]
    assert listed == [file.path for file in list_images(str(tree))]
    assert made.read(["path"])["path"].to_pylist() == listed
    assert made.sizes() == [3, 3, 1]
    with pytest.raises(IndexError):
        made.read_unit(3)


@pytest.mark.parametrize("unit_images", [1, 6, 7, 8, 1000])
def test_units_lie_across_row_groups_and_hold_every_row_once(
    tree, tmp_path, unit_images, monkeypatch
):
    monkeypatch.setattr("stego_core.storage.manifest._GROUP_ROWS", 2)
    made = written(tree, tmp_path / "m.parquet", unit_images=unit_images)
    assert pq.ParquetFile(made.uri).num_row_groups == 4
    units = [made.read_unit(unit) for unit in range(made.num_units)]
    assert pa.concat_tables(units) == made.read()
    assert read_manifest(made.uri).sizes() == [unit.num_rows for unit in units]


def test_a_manifest_read_again_is_the_one_that_was_written(tree, tmp_path):
    made = written(tree, tmp_path / "m.parquet")
    assert read_manifest(made.uri) == made
    row = made.read().to_pylist()[0]
    assert row["image_bytes"] == len(row["path"])
    assert row["image_uri"].endswith(row["path"])
    assert row["image_etag"]


def test_the_digest_changes_with_content_names_and_number_and_with_nothing_else(tree, tmp_path):
    before = written(tree, tmp_path / "m.parquet").digest
    assert written(tree, tmp_path / "n.parquet", unit_images=5).digest == before
    stat = (tree / "b.jpg").stat()
    (tree / "b.jpg").write_bytes(b"B.JPG")  # same size
    os.utime(tree / "b.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    changed = written(tree, tmp_path / "m.parquet").digest
    (tree / "b.jpg").rename(tree / "b2.jpg")
    renamed = written(tree, tmp_path / "m.parquet").digest
    (tree / "e").unlink()
    removed = written(tree, tmp_path / "m.parquet").digest
    assert len({before, changed, renamed, removed}) == 4


@pytest.mark.parametrize("name", ["a.jpg", "b/A.JPEG", "x.PNG", "scan.tiff", "000123", "a.b/c"])
def test_image_endings_and_bare_names_are_inputs(name):
    assert is_image_name(name)


@pytest.mark.parametrize("name", ["a.txt", "a.jpg.json", "x/_SUCCESS", "b.parquet", "a.mp4"])
def test_other_files_are_not_inputs(name):
    assert not is_image_name(name)


def test_a_limit_takes_the_first_of_the_stable_order(tree):
    everything = [file.path for file in list_images(str(tree))]
    assert [file.path for file in list_images(str(tree), limit=4)] == everything[:4]
    assert len(list_images(str(tree), limit=99)) == 7


def test_more_images_than_one_output_may_have_are_refused(tree):
    count = len(list_images(str(tree)))
    assert len(list_images(str(tree), most=count)) == count
    with pytest.raises(InputError, match=r"more than 2 images.*give each prefix its own"):
        list_images(str(tree), most=2)
    assert len(list_images(str(tree), most=2, limit=2)) == 2


def test_a_folder_without_images_is_refused(tmp_path):
    write_tree(tmp_path, {"notes.txt": b"x", ".hidden.jpg": b"x"})
    with pytest.raises(InputError, match="no images found"):
        list_images(str(tmp_path))


def test_other_parquet_files_and_other_files_are_not_manifests(tmp_path):
    pq.write_table(pa.table({"image_id": [1]}), tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "empty.parquet").write_bytes(b"")
    for name in ("other", "text", "empty"):
        with pytest.raises(SchemaError, match=rf"{name}\.parquet is not a manifest"):
            read_manifest(str(tmp_path / f"{name}.parquet"))


def test_two_inputs_with_one_id_are_refused(tree, tmp_path):
    files = list_images(str(tree))
    with pytest.raises(InputError, match="same image_id"):
        write_manifest(str(tmp_path / "m.parquet"), [*files, files[0]], unit_images=3)


def test_a_fraction_keeps_its_members_when_the_data_grow(tmp_path):
    many = write_tree(tmp_path / "many", {f"{number}.jpg": b"" for number in range(400)})
    paths = [file.path for file in list_images(str(many))]
    half = [file.path for file in list_images(str(many), fraction=0.5)]
    # What the rule says, one image after another.
    assert half == [path for path in paths if image_id(path) / 2**63 < 0.5]
    assert abs(len(half) - 200) < 50  # five standard deviations of 400 coins
    fifth = [file.path for file in list_images(str(many), fraction=0.2)]
    assert set(fifth) < set(half)
    write_tree(many, {f"new-{number}.jpg": b"" for number in range(400)})
    grown = [file.path for file in list_images(str(many), fraction=0.5)]
    assert [path for path in grown if not path.startswith("new-")] == half
    assert list_images(str(many), fraction=1.0) == list_images(str(many))


def test_a_fraction_is_taken_before_the_limit(tmp_path):
    many = write_tree(tmp_path / "many", {f"{number}.jpg": b"" for number in range(50)})
    half = list_images(str(many), fraction=0.5)
    assert list_images(str(many), fraction=0.5, limit=7) == half[:7]


def test_a_fraction_without_any_image_says_so(tree):
    with pytest.raises(InputError, match="no image is in the fraction 1e-09; take a larger one"):
        list_images(str(tree), fraction=1e-9)


def test_another_fraction_is_another_data_set(tmp_path):
    many = write_tree(tmp_path / "many", {f"{number}.jpg": b"" for number in range(50)})
    digests = {
        write_manifest(
            str(tmp_path / "m.parquet"), list_images(str(many), fraction=f), unit_images=9
        ).digest
        for f in (0.3, 0.6, 1.0)
    }
    assert len(digests) == 3

from __future__ import annotations

import pytest
from factories import write_tree

from stego_core.datasets.directory import open_dataset
from stego_core.errors import InputError


def test_the_layout_with_splits_finds_images_labels_and_class_names(tmp_path):
    write_tree(
        tmp_path,
        {
            "imgs/train/a.jpg": b"",
            "imgs/val/b.jpg": b"",
            "labels/train/a.png": b"",
            "classes.txt": b"sky\n\n  tall tree \nwater\r\n",
        },
    )
    train, val = open_dataset(str(tmp_path), "train"), open_dataset(str(tmp_path), "val")
    assert train.images_uri == f"{tmp_path}/imgs/train"
    assert train.labels_uri == f"{tmp_path}/labels/train"
    assert train.class_names == val.class_names == ("sky", "tall tree", "water")
    assert val.images_uri == f"{tmp_path}/imgs/val"
    assert val.labels_uri is None


@pytest.mark.parametrize("split", ["train", "anything"])
def test_any_other_folder_is_a_data_set_without_labels_and_splits(tmp_path, split):
    write_tree(tmp_path, {"deep/a.jpg": b"", "classes.txt": b"sky"})
    dataset = open_dataset(str(tmp_path), split)
    assert dataset.images_uri == str(tmp_path)
    assert dataset.labels_uri is None
    assert dataset.class_names == ()


@pytest.mark.parametrize(
    ("path", "label"),
    [("a.jpg", "a.png"), ("x/y/a.b.jpeg", "x/y/a.b.png"), ("bare", "bare.png"), ("a.png", "a.png")],
)
def test_labels_are_paired_by_stem_and_folder(tmp_path, path, label):
    write_tree(tmp_path, {"imgs/train/a.jpg": b"", "labels/train/a.png": b""})
    dataset = open_dataset(str(tmp_path), "train")
    assert dataset.label_uri(path) == f"{tmp_path}/labels/train/{label}"


def test_asking_for_labels_where_there_are_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no labels"):
        open_dataset(str(tmp_path), "train").label_uri("a.jpg")


def test_a_missing_split_names_those_that_are_there(tmp_path):
    write_tree(tmp_path, {"imgs/val/b.jpg": b"", "imgs/train/a.jpg": b""})
    with pytest.raises(InputError, match=r"imgs/test: no such split; there are: train, val"):
        open_dataset(str(tmp_path), "test")


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        open_dataset(str(tmp_path / "nowhere"), "train")


def test_a_file_is_not_a_root(tmp_path):
    write_tree(tmp_path, {"a.jpg": b"x"})
    with pytest.raises(InputError, match=r"a\.jpg: no such folder"):
        open_dataset(str(tmp_path / "a.jpg"), "train")


def test_what_editors_leave_in_class_names(tmp_path):
    names = "sky\nlärm".encode("utf-8-sig")
    root = write_tree(tmp_path, {"imgs/train/a.jpg": b"", "classes.txt": names})
    assert open_dataset(str(root), "train").class_names == ("sky", "lärm")
    write_tree(root, {"classes.txt": "lärm".encode("latin-1")})
    with pytest.raises(InputError, match=r"classes\.txt is not UTF-8: save it in that encoding"):
        open_dataset(str(root), "train")


def test_images_without_splits_are_told_from_a_split_that_is_not_there(tmp_path):
    root = write_tree(tmp_path, {f"imgs/{number:03d}.jpg": b"" for number in range(100)})
    with pytest.raises(InputError, match=f"there are none: give --data.root {root}/imgs") as caught:
        open_dataset(str(root), "train")
    assert len(str(caught.value)) < 300
    write_tree(root, {"imgs/000/a.jpg": b"", "imgs/val/b.jpg": b""})
    with pytest.raises(InputError, match=r"there are: 000 \(--data\.split\)"):
        open_dataset(str(root), "train")

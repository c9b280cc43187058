"""What is said of a data set before a run."""

from __future__ import annotations

import io

import numpy as np
import pytest
from factories import picture, png_bytes, write_tree
from PIL import Image

from stego_core.config.schema import ImageLimits
from stego_core.datasets import check as check_module
from stego_core.datasets.check import LabelValues, _finding, check_dataset
from stego_core.datasets.directory import open_dataset
from stego_core.distributed.data import decoders
from stego_core.storage import fs
from stego_core.storage.manifest import list_images

DECODERS = decoders(ImageLimits())


def tree(root, *, images=4, classes=b"sky\nsea\n"):
    for number in range(images):
        write_tree(
            root,
            {
                f"imgs/train/{number}.png": png_bytes(picture(20, 30, seed=number)),
                f"labels/train/{number}.png": png_bytes(np.full((20, 30), number % 2, np.uint8)),
            },
        )
    return write_tree(root, {"classes.txt": classes})


def check(root, *, limit=None, is_subset=False):
    dataset = open_dataset(str(root), "train")
    return check_dataset(
        dataset, list_images(dataset.images_uri, limit=limit), DECODERS, is_subset=is_subset
    )


def kinds(found):
    return {finding.kind: finding.count for finding in found.findings}


def test_a_sound_data_set_has_counts_and_no_findings(tmp_path):
    found = check(tree(tmp_path))
    assert (found.images, found.labels, found.pairs, found.sampled) == (4, 4, 4, 4)
    assert found.findings == ()


def test_each_kind_of_oddness_is_one_finding_with_count_and_first_example(tmp_path):
    tree(tmp_path, images=9)
    labels, images = tmp_path / "labels/train", tmp_path / "imgs/train"
    (labels / "0.png").unlink()
    (images / "1.png").unlink()
    (images / "2.png").rename(images / "2.jpg")
    write_tree(images, {"2.webp": b"x"})
    (labels / "3.png").write_bytes(b"broken")
    (labels / "4.png").write_bytes(png_bytes(np.full((20, 30), 2, np.uint8)))
    (labels / "5.png").write_bytes(png_bytes(np.full((20, 30), 7, np.uint8)))
    (labels / "6.png").write_bytes(png_bytes(np.zeros((30, 20), np.uint8)))
    found = check(tmp_path)
    assert kinds(found) == {
        "images_without_label": 1,
        "labels_without_image": 1,
        "shared_label": 1,
        "unreadable_label": 1,
        "unknown_class": 2,
        "other_shape": 1,
    }
    texts = {finding.kind: finding.text for finding in found.findings}
    assert texts["images_without_label"] == "1 of 9 images have no label file: 0.png"
    assert texts["labels_without_image"].endswith("1 of 8 label files have no image: 1.png")
    assert texts["shared_label"].endswith(": 2.jpg and 2.webp")
    assert "classes.txt names 2" in texts["unknown_class"]
    assert "30 x 20" not in texts["other_shape"].split("for")[0]
    assert not any("\n" in text for text in texts.values())
    assert (found.images, found.labels, found.pairs) == (9, 8, 8)


def test_a_data_set_without_labels_is_not_looked_into(tmp_path, monkeypatch):
    write_tree(tmp_path, {"imgs/train/a.jpg": b"", "imgs/train/a.png": b""})
    dataset = open_dataset(str(tmp_path), "train")
    files = list_images(dataset.images_uri)
    monkeypatch.setattr(fs, "list_files", None)
    monkeypatch.setattr(fs, "read_bytes", None)
    found = check_dataset(dataset, files, DECODERS, is_subset=False)
    assert (found.images, found.labels, found.findings) == (2, 0, ())


def test_labels_of_images_left_out_on_purpose_are_no_surprise(tmp_path):
    tree(tmp_path)
    assert kinds(check(tmp_path, limit=2, is_subset=True)) == {}
    assert kinds(check(tmp_path, limit=2)) == {"labels_without_image": 2}


def test_without_class_names_any_class_id_is_one(tmp_path):
    tree(tmp_path, classes=b"")
    label = tmp_path / "labels/train/0.png"
    label.write_bytes(png_bytes(np.full((20, 30), 254, np.uint8)))
    assert kinds(check(tmp_path)) == {}
    label.write_bytes(png_bytes(np.full((20, 30), 300, np.uint16)))
    assert kinds(check(tmp_path)) == {"unknown_class": 1}


def test_without_class_names_the_values_that_labels_hold_are_told(tmp_path):
    root = tree(tmp_path, images=3, classes=b"")
    label = np.full((20, 30), 255, np.uint8)
    label[:5, :4], label[5:9] = 7, 30
    (root / "labels/train/0.png").write_bytes(png_bytes(label))
    (root / "labels/train/1.png").write_bytes(png_bytes(np.full((20, 30), 4, np.uint8)))
    found = check(root)
    assert found.values == LabelValues(minimum=0, maximum=30, distinct=4)  # 0, 4, 7, 30
    assert found.values_text == (
        "label values beside 255: 0 to 30, 4 different, in 3 label files; "
        "no classes.txt to compare them with"
    )
    assert found.findings == ()


def test_values_of_a_sample_are_said_to_be_of_one(tmp_path, monkeypatch):
    root = tree(tmp_path, images=6, classes=b"")
    monkeypatch.setattr(check_module, "SAMPLED_LABELS", 5)
    assert "0 to 1, 2 different, in a sample of 5 of 6 label files;" in check(root).values_text


def test_labels_of_255_alone_and_labels_that_cannot_be_read_have_no_values(tmp_path):
    root = tree(tmp_path, images=1, classes=b"")
    label = root / "labels/train/0.png"
    label.write_bytes(png_bytes(np.full((20, 30), 255, np.uint8)))
    assert check(root).values == LabelValues(minimum=None, maximum=None, distinct=0)
    assert check(root).values_text.startswith("label values beside 255: none, in 1 label files;")
    label.write_bytes(b"broken")
    assert (check(root).values, check(root).values_text) == (None, None)


def test_class_names_say_what_values_may_be_and_nothing_is_told_of_them(tmp_path):
    found = check(tree(tmp_path))
    assert (found.values, found.values_text) == (None, None)


def test_255_is_never_an_unknown_class(tmp_path):
    tree(tmp_path)
    label = np.full((20, 30), 255, np.uint8)
    (tmp_path / "labels/train/0.png").write_bytes(png_bytes(label))
    assert kinds(check(tmp_path)) == {}


@pytest.mark.parametrize(
    ("shape", "is_odd"),
    [((40, 60), False), ((10, 15), False), ((7, 10), False), ((20, 31), False), ((20, 40), True)],
)
def test_labels_of_another_size_are_sound_if_the_shape_is_the_same(shape, is_odd, tmp_path):
    tree(tmp_path)
    (tmp_path / "labels/train/0.png").write_bytes(png_bytes(np.zeros(shape, np.uint8)))
    assert ("other_shape" in kinds(check(tmp_path))) == is_odd


def test_an_image_on_its_side_is_compared_upright(tmp_path):
    tree(tmp_path)
    exif = Image.Exif()
    exif[274] = 6
    buffer = io.BytesIO()
    Image.fromarray(picture(30, 20)).save(buffer, "PNG", exif=exif)
    (tmp_path / "imgs/train/0.png").write_bytes(buffer.getvalue())
    assert kinds(check(tmp_path)) == {}


def test_a_sample_of_bounded_size_is_read_and_always_the_same(tmp_path, monkeypatch):
    tree(tmp_path, images=12)
    monkeypatch.setattr(check_module, "SAMPLED_LABELS", 5)
    reads = []

    def read(uri, read=fs.read_bytes):
        reads.append(uri)
        return read(uri)

    monkeypatch.setattr(fs, "read_bytes", read)
    assert check(tmp_path).sampled == 5
    first, reads[:] = sorted(reads), []
    assert len(first) == 11  # a label and an image each, and classes.txt
    check(tmp_path)
    assert sorted(reads) == first


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "MPO"])
def test_the_shape_of_every_accepted_format_is_seen(kind, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(picture(20, 30)).save(buffer, kind)
    write_tree(tmp_path, {f"imgs/train/a.{kind.lower()}": buffer.getvalue()})
    file = next(fs.list_files(str(tmp_path)))
    assert check_module._image_size(file, DECODERS) == (20, 30)


def test_many_of_a_kind_are_told_by_three_and_kept_by_a_hundred():
    finding = _finding("odd", [f"{n}.png" for n in range(200)], "{} files are odd")
    assert finding is not None
    assert finding.text == "200 files are odd: 0.png, 1.png, 2.png, ..."
    assert (finding.count, len(finding.examples)) == (200, 100)

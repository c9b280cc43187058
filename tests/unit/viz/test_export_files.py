"""Where label files go, and what is in them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import picture, png_bytes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stego_core.config.limits import ImageLimits
from stego_core.images.apart import ApartDecoder
from stego_core.masks.classes import name_classes
from stego_core.masks.codec import decode_mask, encode_mask
from stego_core.masks.palette import cluster_colors
from stego_core.viz.export import Exporter, Names

OWN = [f"cluster {number}" for number in range(4)]
LABELS = np.arange(6, dtype=np.uint8).reshape(2, 3) % 4


def named(*paths: str) -> list[str]:
    names = Names(paths, range(len(paths)))
    return [names.of(path, number) for number, path in enumerate(paths)]


def test_files_lie_as_their_pictures_do() -> None:
    assert named("a.jpg", "sub/deep/b.c.png", "no-suffix") == ["a", "sub/deep/b.c", "no-suffix"]


def test_pictures_that_differ_in_their_suffix_alone_keep_it() -> None:
    found = named("x/a.jpg", "x/a.png", "y/a.jpg", "x/b.jpg", "x/a.jpg.tif")
    assert found == ["x/a.jpg", "x/a.png", "y/a", "x/b", "x/a.jpg.tif"]


@pytest.mark.parametrize(
    "path", ["../a.jpg", "/etc/a.jpg", "a//b.jpg", "./a.jpg", "a\\..\\b.jpg", "C:a.jpg", "x\0.jpg"]
)
def test_nothing_leads_out_of_the_export(path: str) -> None:
    assert named("fine.jpg", path) == ["fine", "by-id/1"]


def test_a_name_that_is_too_long_for_a_file_system_is_an_id() -> None:
    assert named("ü" * 98 + ".jpg", "ü" * 99 + ".jpg") == ["ü" * 98, "by-id/1"]


@given(st.lists(st.text("ab./", min_size=1, max_size=6), unique=True, max_size=20))
def test_no_two_pictures_share_a_file(paths: list[str]) -> None:
    found = named(*paths)
    assert len({*found}) == len(paths)
    assert all(".." not in name.split("/") and not name.startswith("/") for name in found)


def row(folder: Path, **values: Any) -> dict[str, Any]:
    (folder / "in.png").write_bytes(png_bytes(picture(8, 12)))
    return {
        "image_id": 7,
        "image_uri": str(folder / "in.png"),
        "status": "ok",
        "detail": None,
        "mask": {"bytes": encode_mask(LABELS)},
        "image_height": 8,
        "image_width": 12,
    } | values


def test_labels_have_the_size_of_the_picture_and_its_classes(tmp_path: Path) -> None:
    classes = name_classes(OWN, {0: "sky", 1: "", 3: "sky"})
    exporter = Exporter(str(tmp_path / "out"), classes, at_image_size=True, decoder=None)
    entry = exporter.write(row(tmp_path), "sub/a")
    assert (entry["label"], entry["overlay"]) == ("labels/sub/a.png", None)
    with Image.open(tmp_path / "out" / entry["label"]) as image:
        assert (image.mode, image.size) == ("P", (12, 8))
        palette = np.array(image.getpalette()).reshape(-1, 3)
        found = np.asarray(image)
    expected = classes.apply(LABELS).repeat(4, 0).repeat(4, 1)
    np.testing.assert_array_equal(found, expected)
    assert palette[:2].tolist() == cluster_colors(4)[[0, 2]].tolist()
    assert palette[255].tolist() == [128, 128, 128]


def test_a_stored_mask_without_names_is_copied_as_it_is(tmp_path: Path) -> None:
    exporter = Exporter(str(tmp_path), name_classes(OWN, {}), at_image_size=False, decoder=None)
    entry = exporter.write(row(tmp_path), "a")
    data = (tmp_path / entry["label"]).read_bytes()
    assert data == encode_mask(LABELS)
    assert decode_mask(data).tolist() == LABELS.tolist()


def test_an_overlay_is_the_picture_in_the_colours_of_its_classes(tmp_path: Path) -> None:
    decoder = ApartDecoder(ImageLimits(min_side=1))
    exporter = Exporter(str(tmp_path), name_classes(OWN, {}), at_image_size=True, decoder=decoder)
    entry = exporter.write(row(tmp_path), "a")
    with Image.open(io.BytesIO((tmp_path / entry["overlay"]).read_bytes())) as image:
        assert (image.format, image.size) == ("JPEG", (12, 8))


def test_a_picture_that_is_gone_has_labels_and_no_overlay(tmp_path: Path) -> None:
    decoder = ApartDecoder(ImageLimits())
    exporter = Exporter(str(tmp_path), name_classes(OWN, {}), at_image_size=True, decoder=decoder)
    entry = exporter.write(row(tmp_path, image_uri=str(tmp_path / "gone.png")), "a")
    assert entry["overlay"] is None
    assert entry["detail"].startswith("no overlay: ")
    assert (tmp_path / entry["label"]).exists()


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    exporter = Exporter(str(tmp_path), name_classes(OWN, {}), at_image_size=True, decoder=None)
    for length in range(190, 230, 3):
        (name,) = named("a" * length + ".jpg")
        assert (tmp_path / str(exporter.write(row(tmp_path), name)["label"])).exists()


def test_an_image_without_a_mask_has_a_row_and_no_file(tmp_path: Path) -> None:
    exporter = Exporter(str(tmp_path), name_classes(OWN, {}), at_image_size=True, decoder=None)
    entry = exporter.write(row(tmp_path, status="truncated", detail="why", mask=None), "a")
    assert (entry["status"], entry["label"], entry["detail"]) == ("truncated", None, "why")
    assert not (tmp_path / "labels").exists()

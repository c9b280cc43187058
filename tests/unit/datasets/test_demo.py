from __future__ import annotations

import importlib.util

import pytest
from PIL import Image

from stego_core.datasets import demo
from stego_core.datasets.demo import DEMO_FOLDER, resolve_demo, write_demo_images
from stego_core.errors import ConfigError

needs_photographs = pytest.mark.skipif(
    not (importlib.util.find_spec("skimage") and importlib.util.find_spec("sklearn")),
    reason="needs the photographs of the extra `demo`",
)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(demo, "_PHOTOGRAPHS", demo._PHOTOGRAPHS[1:2] + demo._PHOTOGRAPHS[-1:])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@needs_photographs
def test_the_pictures_are_the_same_in_every_folder(few, tmp_path):
    assert write_demo_images(str(tmp_path / "a")) == str(tmp_path / "a")
    write_demo_images(str(tmp_path / "b"))
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    assert sorted(first) == sorted(f"{s}-{n}.jpg" for s in ("chelsea", "flower") for n in range(9))
    assert len(set(first.values())) == len(first)


@needs_photographs
def test_writing_again_touches_nothing_that_is_there_and_adds_what_is_missing(few, tmp_path):
    write_demo_images(str(tmp_path))
    before = contents(tmp_path)
    (tmp_path / "flower-3.jpg").unlink()
    (tmp_path / "chelsea-0.jpg").write_bytes(b"mine")
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write_demo_images(str(tmp_path))
    assert contents(tmp_path) == before | {"chelsea-0.jpg": b"mine"}
    for name, written in times.items():
        assert (tmp_path / name).stat().st_mtime_ns == written


@needs_photographs
def test_crops_are_smaller_pictures_of_bounded_size(few, tmp_path):
    write_demo_images(str(tmp_path))
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert image.format == "JPEG"
            assert 100 < min(image.size) <= max(image.size) <= 480


@pytest.mark.parametrize(("width", "height"), [(640, 427), (100, 3000), (8, 8)])
def test_crops_lie_inside_the_photograph_and_keep_its_shape(width, height):
    boxes = demo._crop_boxes(width, height, "name")
    assert boxes[0] == (0, 0, width, height)
    assert boxes == demo._crop_boxes(width, height, "name") != demo._crop_boxes(width, height, "x")
    for left, top, right, bottom in boxes[1:]:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert 0.2 < (right - left) / width < 0.76


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"need skimage: pip install 'stego-ray\[demo\]'"):
        write_demo_images(str(tmp_path))


def test_other_roots_are_taken_as_they_are():
    assert resolve_demo("s3://bucket/x", write=True) == "s3://bucket/x"
    assert resolve_demo("demos", write=False) == "demos"


def test_a_plan_writes_no_pictures(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_demo("demo", write=False) is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / DEMO_FOLDER).mkdir(parents=True)
    # Absolute, because workers have working directories of their own.
    assert resolve_demo("demo", write=False) == str(tmp_path / DEMO_FOLDER)

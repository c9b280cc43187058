"""Every reason why an image can't be used is met by a real file, read as the jobs read it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from stego_core.config.schema import ImageLimits
from stego_core.distributed import fetch
from stego_core.distributed.fetch import WholeImage, fetch_unit, read_or_reason
from stego_core.errors import ImageProblem
from stego_core.images.decode import ImageFailure
from stego_core.storage import fs
from stego_core.storage.manifest import write_manifest

LIMITS = ImageLimits(max_bytes=40_000, max_pixels=120 * 120, max_side=200, min_side=8)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_files(folder: Path) -> None:
    noise(64, 64).save(folder / "ok.jpg")
    (folder / "empty.jpg").touch()
    (folder / "not_an_image.png").write_text("<!DOCTYPE html><html>not found</html>")
    noise(32, 32).save(folder / "unsupported_format.jpg", "GIF")
    floats = Image.fromarray(np.zeros((32, 32), np.float32))
    floats.save(folder / "unsupported_mode.tif")
    whole = (folder / "ok.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    noise(150, 150).save(folder / "too_many_bytes.bmp")
    Image.new("RGB", (150, 150)).save(folder / "too_many_pixels.png")
    Image.new("RGB", (201, 20)).save(folder / "too_long_side.png")
    Image.new("RGB", (20, 7)).save(folder / "too_small.png")
    Image.new("RGB", (20, 20)).save(folder / "vanished.png")
    Image.new("RGB", (20, 20)).save(folder / "read_failed.png")


def test_each_reason_has_a_file_that_ends_so(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    write_files(folder)
    files = list(fs.list_files(str(folder)))
    manifest = write_manifest(str(tmp_path / "manifest.parquet"), files, unit_images=100)
    (folder / "vanished.png").unlink()
    (folder / "read_failed.png").unlink()
    (folder / "read_failed.png").mkdir()  # reading a folder is an error that is none of the above
    prepare = WholeImage(resolution=32, patch=16)
    rows = fetch_unit(0, manifest=manifest, prepare=prepare, limits=LIMITS).to_pylist()
    found = {Path(row["image_uri"]).stem: row for row in rows}
    for name, row in found.items():
        assert row["status"] == name
        assert (row["detail"] is None) == (row["pixels"] is not None) == (name == "ok")
    processes = {ImageProblem.CRASHED.value, ImageProblem.TIMED_OUT.value}  # test_isolate.py
    elsewhere = {ImageProblem.READ_DENIED.value, ImageProblem.BAD_NAME.value, *processes}
    assert found.keys() == {problem.value for problem in ImageProblem} - elsewhere


def test_a_picture_whose_name_no_table_can_hold_is_one_row(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"caf\xe9.png", "café.png".encode()):
        Image.new("RGB", (20, 20)).save(folder / os.fsdecode(name))
    files = list(fs.list_files(str(folder)))
    manifest = write_manifest(str(tmp_path / "manifest.parquet"), files, unit_images=100)
    prepare = WholeImage(resolution=32, patch=16)
    rows = fetch_unit(0, manifest=manifest, prepare=prepare, limits=LIMITS).to_pylist()
    assert {(Path(row["image_uri"]).name, row["status"], row["detail"]) for row in rows} == {
        ("café.png", "ok", None),
        ("caf\\xe9.png", "bad_name", "its name is not UTF-8: rename it"),
    }


def test_a_file_that_may_not_be_read_is_told_apart(tmp_path):
    path = tmp_path / "denied.png"
    Image.new("RGB", (20, 20)).save(path)
    path.chmod(0)
    me = os.geteuid()
    try:
        if me == 0:
            os.seteuid(65534)  # root may read everything, nobody may not
        answer = read_or_reason(str(path))
    finally:
        os.seteuid(me)
    assert isinstance(answer, ImageFailure)
    assert answer.problem is ImageProblem.READ_DENIED


def test_an_object_that_is_not_there_yet_is_asked_for_once_more(monkeypatch):
    asked = []

    def read_bytes(uri):
        asked.append(uri)
        if len(asked) == 1:
            raise FileNotFoundError(uri)
        return b"there"

    monkeypatch.setattr(fs, "read_bytes", read_bytes)
    monkeypatch.setattr(fetch, "_SECOND_LOOK_S", 0.0)
    assert read_or_reason("s3://bucket/a.jpg") == b"there"
    assert len(asked) == 2
    asked.clear()
    answer = read_or_reason("a.jpg")  # a folder has it, or has not
    assert isinstance(answer, ImageFailure)
    assert (answer.problem, len(asked)) == (ImageProblem.VANISHED, 1)


def test_a_name_that_arrow_can_not_take_is_one_picture_s_reason(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    found = read_or_reason("s3://bucket/photos//a.jpg")  # which S3 itself allows
    assert found.problem == ImageProblem.READ_FAILED
    assert "Empty path component" in found.detail


def test_a_file_that_nobody_listed_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: asked.append("waited"))
    asked = []

    def gone(uri):
        asked.append(uri)
        raise FileNotFoundError

    monkeypatch.setattr(fs, "read_bytes", gone)
    for is_listed in (False, True):
        found = read_or_reason("s3://bucket/label.png", is_listed=is_listed)
        assert found.problem == ImageProblem.VANISHED
    assert asked == ["s3://bucket/label.png"] * 2 + ["waited", "s3://bucket/label.png"]

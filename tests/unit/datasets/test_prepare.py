"""Official trees become our layout: complete, once, and with every problem told."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from factories import picture, png_bytes, write_tree
from official_trees import COUNTS, SIZE, TREES, ids, mat_bytes, write_coco, write_voc
from PIL import Image

from stego_core.config.schema import PrepareJob
from stego_core.datasets import potsdam
from stego_core.datasets import prepare as prepare_module
from stego_core.datasets.directory import open_dataset
from stego_core.datasets.prepare import DATASETS, place_file, plan_prepare, prepare
from stego_core.distributed.data import decoders
from stego_core.errors import CheckpointError, ConfigError, InputError
from stego_core.storage.lease import hold
from stego_core.storage.run import RunDirectory


def job_of(name, root, out, **settings):
    return PrepareJob(dataset=name, source=str(root), out=str(out), **settings)


def run(job):
    prepare(job, RunDirectory(job.out, job="prepare_data"), decoders(job.limits))


def files(folder):
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def data_files(out):
    return {n: d for n, d in files(out).items() if n.startswith(("imgs/", "labels/"))}


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


@pytest.mark.parametrize("name", DATASETS)
def test_every_official_tree_becomes_our_layout(name, tmp_path):
    root, out = TREES[name](tmp_path / "in"), tmp_path / "out"
    run(job_of(name, root, out))
    for split, (num_images, num_labels) in COUNTS[name].items():
        dataset = open_dataset(str(out), split)
        assert dataset.class_names == DATASETS[name].class_names
        images = sorted(Path(dataset.images_uri).iterdir())
        labels = sorted(Path(dataset.labels_uri).iterdir())
        assert (len(images), len(labels)) == (num_images, num_labels)
        assert [path.stem for path in images] == [path.stem for path in labels]
        for image, label in zip(images, labels, strict=True):
            assert pixels(image).shape == (*pixels(label).shape, 3)
            assert pixels(label).dtype == np.uint8
            values = set(np.unique(pixels(label)).tolist())
            assert values <= {*range(len(dataset.class_names)), 255}
            assert len(values) > 1
    status = json.loads((out / "status.json").read_text())
    assert status["counts"]["train_images"] == COUNTS[name]["train"][0]


@pytest.mark.parametrize("name", DATASETS)
def test_a_second_run_writes_nothing(name, tmp_path):
    root, out = TREES[name](tmp_path / "in"), tmp_path / "out"
    run(job_of(name, root, out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.parent != out}
    inodes = {path: path.stat().st_ino for path in before}
    run(job_of(name, root, out))
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.*") if p.parent != out}
    assert inodes == {path: path.stat().st_ino for path in before}


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("writes", [1, 5])
def test_a_run_that_dies_anywhere_is_completed_by_the_next(name, writes, tmp_path, monkeypatch):
    root = TREES[name](tmp_path / "in")
    run(job_of(name, root, tmp_path / "whole", threads=1, link=False))
    left = [writes]

    def dying(uri, data, write=prepare_module.fs.write_bytes):
        left[0] -= "/imgs/" in uri or "/labels/" in uri
        if left[0] < 0:
            raise KeyboardInterrupt
        write(uri, data)

    job = job_of(name, root, tmp_path / "out", threads=1, link=False)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.fs, "write_bytes", dying)
        with pytest.raises(KeyboardInterrupt):
            run(job)
    assert 0 < len(data_files(tmp_path / "out")) < len(data_files(tmp_path / "whole"))
    run(job)
    assert data_files(tmp_path / "out") == data_files(tmp_path / "whole")


def test_images_are_linked_and_never_encoded_again(tmp_path):
    root, out = write_voc(tmp_path / "in"), tmp_path / "out"
    run(job_of("voc2012", root, out, splits=("val",)))
    source = root / "VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg"
    assert (out / "imgs/val/2007_000033.jpg").samefile(source)
    run(job_of("voc2012", root, tmp_path / "copies", splits=("val",), link=False))
    copy = tmp_path / "copies/imgs/val/2007_000033.jpg"
    assert copy.read_bytes() == source.read_bytes()
    assert not copy.samefile(source)


@pytest.mark.parametrize(
    ("refused", "kind"), [(("link",), "symlink"), (("link", "symlink"), "file")]
)
def test_where_hard_links_do_not_work_another_way_is_taken(refused, kind, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EXDEV, "not here")

    for name in refused:
        monkeypatch.setattr(os, name, refuse)
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    target = tmp_path / "out" / "b.jpg"
    place_file(tmp_path / "a.jpg", str(target), link=True)
    place_file(tmp_path / "a.jpg", str(target), link=True)
    assert target.read_bytes() == b"pixels"
    assert target.is_symlink() == (kind == "symlink")
    assert [path.name for path in target.parent.iterdir()] == ["b.jpg"]


def test_coarse_labels_are_those_of_the_table_pixel_by_pixel(tmp_path):
    root, out = write_coco(tmp_path / "in"), tmp_path / "out"
    run(job_of("cocostuff27", root, out, splits=("val",)))
    fine = pixels(root / "annotations/val2017/000000000100.png")
    table = DATASETS["cocostuff27"].to_classes(np.arange(182)[None])[0].tolist()
    expected = [[255 if v == 255 else table[v] for v in row] for row in fine.tolist()]
    assert pixels(out / "labels/val/000000000100.png").tolist() == expected


def test_coco_takes_the_curated_lists_and_without_them_all_images_and_says_so(tmp_path):
    listed = plan_prepare(job_of("cocostuff27", write_coco(tmp_path / "a"), tmp_path / "out"))
    assert any("val: 3 images, 3 with labels" in line for line in listed)
    assert any("val: the 3 images of" in line and "_Coarse_7.txt" in line for line in listed)
    every = write_coco(tmp_path / "b", lists=False, labels="stuffthingmaps/")
    plan = plan_prepare(job_of("cocostuff27", every, tmp_path / "out"))
    assert any("val: 4 images, 4 with labels" in line for line in plan)
    assert any("val: all images: there is no" in line for line in plan)


def test_mosaics_are_halved_and_cut_row_by_row(tmp_path):
    root, out = TREES["potsdam3-raw"](tmp_path / "in"), tmp_path / "out"
    run(job_of("potsdam3-raw", root, out))
    names = sorted(path.name for path in (out / "imgs/val").iterdir())
    assert names == [f"top_potsdam_2_13_r{r:02d}_c{c:02d}.png" for r in (0, 1) for c in (0, 1, 2)]
    mosaic = pixels(root / "2_Ortho_RGB/top_potsdam_2_13_RGB.tif").astype(float)
    part = mosaic[400:800, 800:1200].reshape(200, 2, 200, 2, 3).mean((1, 3))
    tile = pixels(out / "imgs/val/top_potsdam_2_13_r01_c02.png")
    assert np.abs(tile - part).max() <= 1  # rounding
    colours = pixels(root / "5_Labels_all/top_potsdam_2_13_label.tif")[400:800:2, 800:1200:2]
    expected = np.full((200, 200), 255)
    for colour, six in potsdam.COLOURS.items():
        three = {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2}.get(six, 255)
        expected[(colours == colour).all(-1)] = three
    label = pixels(out / "labels/val/top_potsdam_2_13_r01_c02.png")
    np.testing.assert_array_equal(label, expected)


def test_a_mat_tile_keeps_three_channels_and_its_values(tmp_path):
    root, out = TREES["potsdam3"](tmp_path / "in"), tmp_path / "out"
    run(job_of("potsdam3", root, out, splits=("unlabelled_train", "val")))
    expected = np.random.default_rng(8).integers(0, 256, (*SIZE, 4), dtype=np.uint8)[..., :3]
    np.testing.assert_array_equal(pixels(out / "imgs/val/8.png"), expected)
    assert len(list((out / "imgs/unlabelled_train").iterdir())) == 5
    assert len(list((out / "labels/unlabelled_train").iterdir())) == 3


def test_labels_may_be_missing_altogether_or_come_later(tmp_path):
    root, out = write_voc(tmp_path / "in", labels=False), tmp_path / "out"
    job = job_of("voc2012", root, out)
    assert any("no labels: none found in" in line for line in plan_prepare(job))
    run(job)
    assert open_dataset(str(out), "train").labels_uri is None
    write_voc(root)
    run(job)
    assert len(list((out / "labels/train").iterdir())) == 2


def test_a_single_missing_label_is_a_note(tmp_path):
    root = write_voc(tmp_path / "in")
    (root / "VOCdevkit/VOC2012/SegmentationClass/2007_000039.png").unlink()
    job = job_of("voc2012", root, tmp_path / "out")
    lines = plan_prepare(job)
    assert any("1 of 2 images have no label" in line and "2007_000039" in line for line in lines)
    assert not any(line.startswith("problem") for line in lines)
    run(job)
    assert [path.name for path in (tmp_path / "out/labels/train").iterdir()] == ["2007_000032.png"]


def test_a_plan_counts_and_writes_nothing(tmp_path):
    root, out = TREES["cityscapes27"](tmp_path / "in"), tmp_path / "out"
    lines = plan_prepare(job_of("cityscapes27", root, out))
    assert "data set: cityscapes27, 27 classes: road, sidewalk" in lines[0]
    assert "train: 4 images, 4 with labels; 4 images to do" in lines
    assert not out.exists()
    run(job_of("cityscapes27", root, out))
    again = plan_prepare(job_of("cityscapes27", root, out))
    assert "val: 2 images, 2 with labels; 0 images to do" in again


def test_all_that_stands_in_the_way_is_told_at_once_before_anything_is_written(tmp_path):
    root, out = write_coco(tmp_path / "in"), tmp_path / "out"
    (root / "images/train2017/000000000002.jpg").unlink()
    (root / "curated/val2017/Coco164kFull_Stuff_Coarse_7.txt").write_text("\n")
    job = job_of("cocostuff27", root, out, splits=("train", "val", "test"))
    with pytest.raises(InputError) as caught:
        run(job)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "train: " in lines[0]
    assert "1 of 6 listed images are not there, the first: 000000000002" in lines[0]
    assert "val: " in lines[1]
    assert "list of images is empty" in lines[1]
    assert "test: " in lines[2]
    assert "no images there" in lines[2]
    assert not (out / "imgs").exists()
    plan = plan_prepare(job)
    assert [line for line in plan if line.startswith("problem: ")] == [
        f"problem: {n}" for n in lines
    ]


def test_unusable_files_are_all_named_after_the_others_are_written(tmp_path):
    root, out = TREES["cityscapes27"](tmp_path / "in"), tmp_path / "out"
    labels = root / "gtFine/train/aachen"
    names = [f"aachen_{n:06d}_000019_gtFine_labelIds.png" for n in (0, 1)]
    (labels / names[0]).write_bytes(png_bytes(ids([7, 40, 77])))
    (labels / names[1]).write_bytes(b"broken")
    job = job_of("cityscapes27", root, out)
    with pytest.raises(InputError) as caught:
        run(job)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert names[0] in lines[1]
    assert "doesn't have: 40, 77" in lines[1]
    assert names[1] in lines[2]
    assert len(list((out / "imgs/train").iterdir())) == 4
    assert len(list((out / "labels/train").iterdir())) == 2
    assert len(list((out / "labels/val").iterdir())) == 2
    for name in names:
        (labels / name).write_bytes(png_bytes(ids([7, 8])))
    run(job)
    assert len(list((out / "labels/train").iterdir())) == 4


def test_of_many_unusable_files_the_rest_is_in_the_events(tmp_path, monkeypatch):
    monkeypatch.setattr("stego_core.datasets.prepare._SHOWN_PROBLEMS", 1)
    root, out = TREES["cityscapes27"](tmp_path / "in"), tmp_path / "out"
    names = [f"aachen_{n:06d}_000019_gtFine_labelIds.png" for n in (0, 1)]
    for name in names:
        (root / "gtFine/train/aachen" / name).write_bytes(b"broken")
    with pytest.raises(InputError) as caught:
        run(job_of("cityscapes27", root, out))
    lines = str(caught.value).splitlines()
    assert names[0] in lines[1]
    assert lines[2] == f"... and 1 more, all in {out}/events.jsonl"
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    told = [one for event in events for one in event.get("problems", [])]
    assert [name in one for name, one in zip(names, told, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"broken", "not a readable .mat file"),
        (mat_bytes(other=np.zeros((2, 2), np.uint8)), "no array of integers 'img'"),
        (mat_bytes(img=np.zeros((4, 4), np.uint8)), r"'img' is uint8 \(4, 4\)"),
        (mat_bytes(img=np.zeros((4, 4, 3), np.int32)), "'img' is int32"),
    ],
)
def test_a_mat_file_that_is_no_tile_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        potsdam.mat_image(data)


def test_a_mosaic_smaller_than_a_tile_is_named(tmp_path):
    root = TREES["potsdam3-raw"](tmp_path / "in", size=(390, 800))
    with pytest.raises(InputError, match=r"top_potsdam_2_10_RGB\.tif: the mosaic holds no tile"):
        run(job_of("potsdam3-raw", root, tmp_path / "out", splits=("train",)))


def test_files_of_another_split_are_not_mixed_in(tmp_path):
    root, out = write_coco(tmp_path / "in", lists=False), tmp_path / "out"
    run(job_of("cocostuff27", root, out, splits=("val",)))
    write_coco(root)
    with pytest.raises(InputError, match=r"holds 1 files that are not of this split.*103\.jpg"):
        run(job_of("cocostuff27", root, out, splits=("val",)))


def test_one_folder_holds_one_data_set(tmp_path):
    root, out = write_coco(tmp_path / "in"), tmp_path / "out"
    run(job_of("cocostuff27", root, out))
    with pytest.raises(CheckpointError, match="dataset differ"):
        run(job_of("cocostuff15", root, out, splits=("val",)))


def test_what_must_be_given_is_asked_for_at_once():
    with pytest.raises(ConfigError) as caught:
        plan_prepare(PrepareJob(splits=("../x",)))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "--dataset",
        "--source",
        "--splits ../x",
    ]
    with pytest.raises(InputError, match="no such folder; check --source"):
        plan_prepare(PrepareJob(dataset="camvid", source="/nowhere/at/all"))


@pytest.mark.parametrize("name", DATASETS)
def test_an_empty_source_has_a_problem_for_each_split(name, tmp_path):
    (tmp_path / "in").mkdir()
    lines = plan_prepare(job_of(name, tmp_path / "in", tmp_path / "out"))
    for split in DATASETS[name].splits:
        assert any(line.startswith(f"problem: {split}: ") for line in lines)


def test_unlisted_areas_and_unknown_splits_of_potsdam_are_left_out_or_named(tmp_path):
    root = TREES["potsdam3-raw"](tmp_path / "in")
    write_tree(root, {"2_Ortho_RGB/top_potsdam_9_99_RGB.tif": png_bytes(picture())})
    lines = plan_prepare(job_of("potsdam3-raw", root, tmp_path / "out", splits=("all", "half")))
    assert any(line.startswith("all: 3 mosaics, 3 with labels") for line in lines)
    assert any("no split 'half'; there are: train, val, all" in line for line in lines)


def test_images_that_lead_nowhere_and_labels_that_are_folders_are_named(tmp_path):
    root, out = write_voc(tmp_path / "in"), tmp_path / "out"
    base = root / "VOCdevkit/VOC2012"
    (base / "JPEGImages/2007_000032.jpg").unlink()
    (base / "JPEGImages/2007_000032.jpg").symlink_to(tmp_path / "nowhere")
    label = base / "SegmentationClass/2007_000039.png"
    label.unlink()
    label.mkdir()  # what root may not read either
    with pytest.raises(InputError) as caught:
        run(job_of("voc2012", root, out))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "2007_000032.jpg: listed, but gone" in lines[1]
    assert "2007_000039.png: can't be read: Is a directory" in lines[2]
    assert [path.name for path in (out / "imgs/train").iterdir()] == ["2007_000039.jpg"]


def test_an_output_that_can_not_be_written_ends_the_run(tmp_path):
    root = write_voc(tmp_path / "in")
    write_tree(tmp_path, {"out/imgs": b"a file where a folder should be"})
    with pytest.raises(OSError, match="imgs"):
        run(job_of("voc2012", root, tmp_path / "out"))


def test_a_tree_that_another_job_writes_is_left_as_it_is(tmp_path):
    root, out = TREES["camvid"](tmp_path / "in"), tmp_path / "out"
    with hold(str(out)):
        before = files(out)
        with pytest.raises(CheckpointError, match="another job"):
            run(job_of("camvid", root, out))
        assert files(out) == before

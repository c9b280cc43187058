"""Synthetic trees of the official downloads: their folders, names and label values, tiny images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from factories import picture, png_bytes, write_tree
from PIL import Image
from scipy.io import savemat

from stego_core.datasets.potsdam import COLOURS
from stego_core.datasets.voc import NAMES as VOC_NAMES

SIZE = (20, 24)
COCO_LISTS = (
    "Coco164kFull_Stuff_Coarse.txt",
    "Coco164kFull_Stuff_Coarse_7.txt",
    "Coco164kFew_Stuff_6.txt",
)


def jpeg_bytes(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(*SIZE, seed=seed)).save(buffer, "JPEG")
    return buffer.getvalue()


def ids(values, *, seed=0, size=SIZE) -> np.ndarray:
    """A label map in which each of the values occurs."""
    labels = np.resize(np.array(values, np.uint8), size)
    return np.random.default_rng(seed).permuted(labels.ravel()).reshape(size)


def tiff_bytes(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "TIFF")
    return buffer.getvalue()


def mat_bytes(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, arrays)
    return buffer.getvalue()


def palette_bytes(labels: np.ndarray) -> bytes:
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tolist())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_coco(root: Path, *, lists=True, labels="annotations/") -> Path:
    for split, numbers in (("train2017", range(6)), ("val2017", range(100, 104))):
        stems = [f"{number:012d}" for number in numbers]
        files = {
            f"images/{split}/{s}.jpg": jpeg_bytes(n) for s, n in zip(stems, numbers, strict=True)
        }
        for stem, number in zip(stems, numbers, strict=True):
            values = [*range(number % 7, 182, 7), 255]
            files[f"{labels}{split}/{stem}.png"] = png_bytes(ids(values, seed=number))
        for place, name in enumerate(COCO_LISTS if lists else ()):
            chosen = stems[: len(stems) - place]
            files[f"curated/{split}/{name}"] = "".join(f"{s}\n" for s in chosen).encode()
        write_tree(root, files)
    return root


def write_cityscapes(root: Path) -> Path:
    for split, cities in (("train", ("aachen", "bochum")), ("val", ("lindau",))):
        for seed, city in enumerate(cities):
            for number in range(2):
                frame = f"{city}_{number:06d}_000019"
                image = png_bytes(picture(*SIZE, seed=seed * 10 + number))
                label = png_bytes(ids([*range(34), 255], seed=number))
                for ending, data in (("labelIds", label), ("color", image)):
                    write_tree(root, {f"gtFine/{split}/{city}/{frame}_gtFine_{ending}.png": data})
                write_tree(root, {f"leftImg8bit/{split}/{city}/{frame}_leftImg8bit.png": image})
    return root


def write_potsdam(root: Path) -> Path:
    lists = {"labelled_train": range(3), "unlabelled_train": range(5), "labelled_test": (8, 9)}
    for name, numbers in lists.items():
        write_tree(root, {f"{name}.txt": "".join(f"{n}\n" for n in numbers).encode()})
    for number in (0, 1, 2, 3, 4, 8, 9):
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZE, 4), dtype=np.uint8)
        write_tree(root, {f"imgs/{number}.mat": mat_bytes(img=pixels)})
        if number not in (3, 4):
            labels = ids([0, 1, 2, 3, 4, 5, 255], seed=number)
            write_tree(root, {f"gt/{number}.mat": mat_bytes(gt=labels)})
    return root


def write_potsdam_raw(root: Path, *, size=(820, 1230)) -> Path:
    colours = np.array(list(COLOURS), np.uint8)
    for seed, area in enumerate(("2_10", "7_12", "2_13")):
        blocks = np.random.default_rng(seed).integers(
            0, len(colours), (size[0] // 10, size[1] // 10)
        )
        label = colours[np.kron(blocks, np.ones((10, 10), int))]
        name = f"top_potsdam_{area}"
        write_tree(
            root,
            {
                f"2_Ortho_RGB/{name}_RGB.tif": tiff_bytes(picture(*size, seed=seed)),
                f"5_Labels_all/{name}_label.tif": tiff_bytes(label),
            },
        )
    return root


def write_voc(root: Path, *, labels=True) -> Path:
    base = "VOCdevkit/VOC2012"
    lists = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}
    lists["trainval"] = sorted(lists["train"] + lists["val"])
    for name, stems in lists.items():
        text = "".join(f"{stem}\n" for stem in stems)
        write_tree(root, {f"{base}/ImageSets/Segmentation/{name}.txt": text.encode()})
    for seed, stem in enumerate([*lists["trainval"], "2008_000001"]):
        write_tree(root, {f"{base}/JPEGImages/{stem}.jpg": jpeg_bytes(seed)})
        if labels and stem in lists["trainval"]:
            data = palette_bytes(ids([*range(len(VOC_NAMES)), 255], seed=seed))
            write_tree(root, {f"{base}/SegmentationClass/{stem}.png": data})
    return root


def write_camvid(root: Path) -> Path:
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        for number in range(count):
            name = f"0001TP_{split}_{number:06d}.png"
            write_tree(
                root,
                {
                    f"CamVid/{split}/{name}": png_bytes(picture(*SIZE, seed=number)),
                    f"CamVid/{split}annot/{name}": png_bytes(ids(range(12), seed=number)),
                },
            )
    return root


TREES = {
    "cocostuff27": write_coco,
    "cocostuff15": write_coco,
    "cocostuff3": write_coco,
    "cityscapes27": write_cityscapes,
    "potsdam3": write_potsdam,
    "potsdam3-raw": write_potsdam_raw,
    "voc2012": write_voc,
    "camvid": write_camvid,
}
# Images and labels of each split that comes out of these trees.
COUNTS = {
    "cocostuff27": {"train": (6, 6), "val": (3, 3)},
    "cocostuff15": {"train": (5, 5), "val": (3, 3)},
    "cocostuff3": {"train": (4, 4), "val": (2, 2)},
    "cityscapes27": {"train": (4, 4), "val": (2, 2)},
    "potsdam3": {"train": (3, 3), "val": (2, 2)},
    "potsdam3-raw": {"train": (12, 12), "val": (6, 6)},
    "voc2012": {"train": (2, 2), "val": (1, 1)},
    "camvid": {"train": (3, 3), "val": (2, 2), "test": (2, 2)},
}

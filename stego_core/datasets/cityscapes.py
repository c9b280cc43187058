"""Cityscapes, fine annotations: 27 classes are label ids 7 to 33.

The unpacked downloads: `leftImg8bit/<split>/<city>/<frame>_leftImg8bit.png` and
`gtFine/<split>/<city>/<frame>_gtFine_labelIds.png`. Ids 0 to 6 and the licence plate, whose -1 an
8-bit PNG can only hold as 255, are not scored. The labels of split `test` are not public: its PNGs
hold ignored ids only.

Source: `id - 7` of the official STEGO code.
"""

from __future__ import annotations

from pathlib import Path

from stego_core.datasets.official import IGNORE, Found, LabelTable, Official, files_by_stem, pair

FIRST_ID = 7
NAMES = (
    "road",
    "sidewalk",
    "parking",
    "rail track",
    "building",
    "wall",
    "fence",
    "guard rail",
    "bridge",
    "tunnel",
    "pole",
    "polegroup",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "caravan",
    "trailer",
    "train",
    "motorcycle",
    "bicycle",
)
_TABLE = dict.fromkeys(range(FIRST_ID), IGNORE)
_TABLE |= {FIRST_ID + class_id: class_id for class_id in range(len(NAMES))}


def _files(folder: Path, ending: str) -> dict[str, Path]:
    """Return the files of all cities by frame; a frame's name starts with that of its city."""
    found: dict[str, Path] = {}
    for city in sorted(folder.iterdir()) if folder.is_dir() else []:
        for stem, path in files_by_stem(city, ending).items():
            name = stem if stem.startswith(f"{city.name}_") else f"{city.name}_{stem}"
            found[name] = path
    return found


def _find(root: Path, split: str) -> Found:
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    return pair(
        _files(images, "_leftImg8bit.png"),
        _files(labels, "_gtFine_labelIds.png"),
        images_at=str(images),
        labels_at=str(labels),
    )


CITYSCAPES27 = Official(
    class_names=NAMES, splits=("train", "val"), find=_find, to_classes=LabelTable(_TABLE)
)

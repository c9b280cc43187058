"""COCO-Stuff 164k: 182 fine ids to 27, 15 or 3 coarse classes.

The unpacked downloads: `images/{train,val}2017/*.jpg`, and the PNGs of
`stuffthingmaps_trainval2017.zip` in `annotations/` or `stuffthingmaps/`, in folders of the same
names. A label PNG holds fine ids 0 to 181 (those of the web page less 1) and 255 for no label.
`curated/{train,val}2017/*.txt` are the lists of images that published results use.

Source: the coarse classes are those of IIC and PiCIE, which STEGO uses.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from stego_core.datasets.official import (
    IGNORE,
    Found,
    LabelTable,
    Official,
    files_by_stem,
    first_folder,
    pair,
    read_list,
)

NUM_FINE = 182

# Coarse class, and its fine ids. Food and furniture are both things and stuff.
COARSE: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("electronic", (71, 72, 73, 74, 75, 76)),
    ("appliance", (77, 78, 79, 80, 81, 82)),
    ("food-thing", (51, 52, 53, 54, 55, 56, 57, 58, 59, 60)),
    ("furniture-thing", (61, 62, 63, 64, 65, 66, 67, 68, 69, 70)),
    ("indoor", (83, 84, 85, 86, 87, 88, 89, 90)),
    ("kitchen", (43, 44, 45, 46, 47, 48, 49, 50)),
    ("accessory", (25, 26, 27, 28, 29, 30, 31, 32)),
    ("animal", (15, 16, 17, 18, 19, 20, 21, 22, 23, 24)),
    ("outdoor", (9, 10, 11, 12, 13, 14)),
    ("person", (0,)),
    ("sports", (33, 34, 35, 36, 37, 38, 39, 40, 41, 42)),
    ("vehicle", (1, 2, 3, 4, 5, 6, 7, 8)),
    ("ceiling", (101, 102)),
    ("floor", (100, 113, 114, 115, 116, 117)),
    ("food-stuff", (120, 121, 152, 169)),
    ("furniture-stuff", (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164)),
    ("rawmaterial", (99, 131, 138, 142)),
    ("textile", (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167)),
    ("wall", (170, 171, 172, 173, 174, 175, 176)),
    ("window", (179, 180)),
    ("building", (94, 95, 127, 150, 157, 165)),
    ("ground", (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158)),
    ("plant", (93, 96, 118, 123, 128, 133, 141, 162, 168)),
    ("sky", (105, 156)),
    ("solid", (126, 134, 149, 159, 161, 181)),
    ("structural", (98, 112, 137, 145, 163)),
    ("water", (119, 147, 154, 177, 178)),
)
NAMES = tuple(name for name, _ in COARSE)
FINE_TO_COARSE = {fine: coarse for coarse, (_, ids) in enumerate(COARSE) for fine in ids}
_FIRST_STUFF = NAMES.index("ceiling")
_FEW = ("sky", "plant", "ground")


def fine_to_classes(names: tuple[str, ...]) -> dict[int, int]:
    """Return fine id → place of its coarse class in `names`, 255 if it isn't among them."""
    places = {NAMES.index(name): place for place, name in enumerate(names)}
    return {fine: places.get(coarse, IGNORE) for fine, coarse in FINE_TO_COARSE.items()}


def _find(root: Path, split: str, *, lists: dict[str, str]) -> Found:
    folder = f"{split}2017"
    images_at = first_folder(root, f"images/{folder}", folder)
    images = files_by_stem(images_at, ".jpg")
    places = [f"{parent}{folder}" for parent in ("annotations/", "stuffthingmaps/", "")]
    labels = next((found for p in places if (found := files_by_stem(root / p, ".png"))), {})
    name = lists.get(split, lists["val"])
    path = root / "curated" / folder / name
    stems = read_list(path)
    if stems is None:
        note = f"all images: there is no {path}, the list that published results use"
    else:
        note = f"the {len(stems)} images of {path}"
        stems = [Path(stem).stem for stem in stems]
    return pair(
        images,
        labels,
        stems=stems,
        images_at=str(images_at or root / "images" / folder),
        labels_at=str(root / "annotations" / folder),
        notes=[note],
    )


def _official(names: tuple[str, ...], lists: dict[str, str]) -> Official:
    return Official(
        class_names=names,
        splits=("train", "val"),
        find=partial(_find, lists=lists),
        to_classes=LabelTable(fine_to_classes(names)),
    )


# The lists of each variant are those of the official code.
_FULL, _SEVEN = "Coco164kFull_Stuff_Coarse.txt", "Coco164kFull_Stuff_Coarse_7.txt"
COCOSTUFF27 = _official(NAMES, {"train": _FULL, "val": _SEVEN})
COCOSTUFF15 = _official(NAMES[_FIRST_STUFF:], {"val": _SEVEN})
COCOSTUFF3 = _official(_FEW, {"val": "Coco164kFew_Stuff_6.txt"})

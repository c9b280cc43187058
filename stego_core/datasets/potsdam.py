"""ISPRS Potsdam with 3 classes: tiles in .mat files, or the mosaics that they are cut from.

Six classes become three: roads and cars, buildings and clutter, vegetation and trees.

The .mat tiles of IIC: `imgs/<name>.mat` (`img`, (200, 200, 4) uint8: red, green, blue, infrared),
`gt/<name>.mat` (`gt`, ids 0 to 5, 255 for none) and lists of names.

The mosaics of ISPRS: `2_Ortho_RGB/top_potsdam_<area>_RGB.tif` of 6000 x 6000 pixels and
`5_Labels_all/top_potsdam_<area>_label.tif` in the colours below. As IIC does, they are halved, then
cut into 15 x 15 tiles of 200 x 200 pixels; pixels that don't fill a tile are left out.

Source: https://github.com/xu-ji/IIC for the tiles; https://www.isprs.org for the mosaics.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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
from stego_core.errors import InputError

NAMES = ("road-car", "building-clutter", "vegetation-tree")
SIX = ("impervious surface", "building", "low vegetation", "tree", "car", "clutter")
_TO_THREE = {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2}
TABLE = LabelTable(_TO_THREE)

TILE = 200  # pixels
_SHRINK = 2  # a mosaic is that much larger than its tiles together

# Red, green and blue of each of the six, and black where a border is left out.
COLOURS: dict[tuple[int, int, int], int] = {
    (255, 255, 255): 0,
    (0, 0, 255): 1,
    (0, 255, 255): 2,
    (0, 255, 0): 3,
    (255, 255, 0): 4,
    (255, 0, 0): 5,
    (0, 0, 0): IGNORE,
}
_OFTEN_HALF = 128  # a few label mosaics hold values next to 0 and 255

_LISTS = {
    "train": "labelled_train.txt",
    "unlabelled_train": "unlabelled_train.txt",
    "val": "labelled_test.txt",
}

# The 24 areas whose labels were public from the start; the other 14 were the benchmark's test.
_TRAIN_AREAS = frozenset(
    [f"{row}_{column}" for row in (2, 3, 4, 5) for column in (10, 11, 12)]
    + [f"{row}_{column}" for row in (6, 7) for column in (7, 8, 9, 10, 11, 12)]
)
_VAL_AREAS = frozenset(
    "2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 6_14 6_15 7_13".split()
)
_AREAS = {"train": _TRAIN_AREAS, "val": _VAL_AREAS, "all": _TRAIN_AREAS | _VAL_AREAS}
_AREA = re.compile(r"top_potsdam_0?(\d+)_0?(\d+)$")


def read_mat(data: bytes, key: str) -> NDArray[Any]:
    """Return an array of a .mat file (version 5, which can't hold code).

    Args:
        data: the whole file.
        key: name of the array.

    Raises:
        InputError: if the file can't be read or has no such array of numbers.
    """
    from scipy.io import loadmat

    try:
        values = loadmat(io.BytesIO(data), variable_names=[key])
    except Exception as error:  # the reader raises nearly anything when a file is damaged
        raise InputError(f"not a readable .mat file: {error or type(error).__name__}") from error
    array = values.get(key)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "ui":
        raise InputError(f"the .mat file has no array of integers '{key}'")
    return array


def mat_image(data: bytes) -> NDArray[np.uint8]:
    """Return the image of a .mat tile: its first three channels, uint8 (H, W, 3).

    Raises:
        InputError: if there is no such image.
    """
    array = read_mat(data, "img")
    if array.ndim != 3 or array.shape[2] < 3 or array.dtype != np.uint8:
        raise InputError(f"'img' is {array.dtype} {array.shape}, not uint8 (H, W, 3 or more)")
    return np.ascontiguousarray(array[..., :3])


def colours_to_ids(colours: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the six classes' ids of a colour-coded label map.

    Each channel counts as off below 128 and as on otherwise.

    Args:
        colours: RGB, uint8 (H, W, 3).

    Returns:
        0 to 5 in the order of `SIX`, 255 where it is black, uint8 (H, W).

    Raises:
        InputError: for pixels of a colour that the data set doesn't have.
    """
    on = colours >= _OFTEN_HALF
    codes = on[..., 0] * 4 + on[..., 1] * 2 + on[..., 2]
    ids = np.full(8, -1, np.int16)
    for (red, green, blue), class_id in COLOURS.items():
        ids[(red > 0) * 4 + (green > 0) * 2 + (blue > 0)] = class_id
    labels = ids[codes]
    if (labels < 0).any():
        colour = colours[labels < 0][0].tolist()
        raise InputError(f"a label colour that the data set doesn't have: {colour}")
    own: NDArray[np.uint8] = labels.astype(np.uint8)
    return own


def colours_to_classes(colours: NDArray[Any]) -> NDArray[np.uint8]:
    """Return class ids, uint8 (H, W), of a colour-coded label map (see `colours_to_ids`)."""
    return TABLE(colours_to_ids(colours))


def halve(pixels: NDArray[np.uint8], *, is_label: bool) -> NDArray[np.uint8]:
    """Return a mosaic at half its size: means of 2 x 2 pixels, of labels the upper left ones.

    Args:
        pixels: RGB, uint8 (H, W, 3); the last row and column of an odd size are left out.
        is_label: colours of classes must not be mixed.
    """
    height, width = pixels.shape[0] // _SHRINK, pixels.shape[1] // _SHRINK
    even = pixels[: height * _SHRINK, : width * _SHRINK]
    if is_label:
        return even[::_SHRINK, ::_SHRINK]
    return np.asarray(Image.fromarray(even).reduce(_SHRINK))


def cut_tiles(mosaic: NDArray[np.uint8]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield the whole tiles of a halved mosaic, the first one last, as name and pixels.

    The tile in the corner is written after all others, so that its file says: this one is done.

    Args:
        mosaic: (H, W) or (H, W, 3).

    Yields:
        `_r00_c00` and so on, and the tile of 200 x 200 pixels.

    Raises:
        InputError: if the mosaic is smaller than a tile.
    """
    rows, columns = mosaic.shape[0] // TILE, mosaic.shape[1] // TILE
    if not rows * columns:
        raise InputError(f"the mosaic holds no tile: {mosaic.shape[0]} x {mosaic.shape[1]}, halved")
    for number in reversed(range(rows * columns)):
        row, column = divmod(number, columns)
        top, left = row * TILE, column * TILE
        yield f"_r{row:02d}_c{column:02d}", mosaic[top : top + TILE, left : left + TILE]


FIRST_TILE = "_r00_c00"


def _find_tiles(root: Path, split: str) -> Found:
    if split not in _LISTS:
        return Found(problems=(f"no split '{split}'; there are: {', '.join(_LISTS)}",))
    path = root / _LISTS[split]
    stems = read_list(path)
    if stems is None:
        return Found(problems=(f"{path}: no such list of tiles; check --source",))
    return pair(
        files_by_stem(root / "imgs", ".mat"),
        files_by_stem(root / "gt", ".mat"),
        stems=[name.removesuffix(".mat") for name in stems],
        images_at=str(root / "imgs"),
        labels_at=str(root / "gt"),
    )


def _find_mosaics(root: Path, split: str) -> Found:
    if split not in _AREAS:
        return Found(problems=(f"no split '{split}'; there are: {', '.join(_AREAS)}",))
    places = ("5_Labels_all", "5_Labels_for_participants", "5_Labels_all_noBoundary")
    images_at, labels_at = root / "2_Ortho_RGB", first_folder(root, *places) or root / places[0]
    images = files_by_stem(images_at, "_RGB.tif")
    labels = files_by_stem(labels_at, "_label.tif")
    labels = files_by_stem(labels_at, "_label_noBoundary.tif") | labels
    areas = {stem: match for stem in images if (match := _AREA.search(stem))}
    ours = [s for s, match in areas.items() if f"{match[1]}_{match[2]}" in _AREAS[split]]
    note = f"mosaics, to be cut into tiles of {TILE} x {TILE} pixels at half size"
    return pair(
        images,
        labels,
        stems=ours,
        images_at=str(images_at),
        labels_at=str(labels_at),
        notes=[note] if ours else [],
    )


POTSDAM3 = Official(
    class_names=NAMES, splits=("train", "val"), find=_find_tiles, to_classes=TABLE, storage="mat"
)
POTSDAM3_RAW = Official(
    class_names=NAMES,
    splits=("train", "val"),
    find=_find_mosaics,
    to_classes=colours_to_classes,
    storage="mosaics",
)

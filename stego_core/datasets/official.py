"""What an official data set is to us: where its files lie, and what its label values mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stego_core.errors import InputError

IGNORE = 255
_UNKNOWN = -1
_SHOWN_VALUES = 8


@dataclass(frozen=True, slots=True)
class Item:
    """One image file of a split.

    Attributes:
        stem: name below the split's folder in our layout, without suffix.
        image: the file.
        label: its label file, or None.
    """

    stem: str
    image: Path
    label: Path | None


@dataclass(frozen=True, slots=True)
class Found:
    """What was found of a split.

    Attributes:
        items: in the order of their list or of their names.
        notes: one line each of what a user should know.
        problems: one line each of what stands in the way.
    """

    items: tuple[Item, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Official:
    """A data set as its makers distribute it.

    Attributes:
        class_names: of class ids 0, 1, ...; all different.
        splits: those that are prepared unless the user names others.
        find: source folder and split → its files; reads names and lists only.
        to_classes: label array as stored → class ids, uint8 (H, W), 255 where there is none;
            InputError for values that the data set doesn't have. Stored arrays are (H, W), for
            `mosaics` RGB (H, W, 3).
        storage: `files`: an image file and a label PNG; `mat`: a .mat file each; `mosaics`: an
            image and a colour-coded label TIFF to be cut into tiles.
    """

    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    find: Callable[[Path, str], Found]
    to_classes: Callable[[NDArray[Any]], NDArray[np.uint8]]
    storage: Literal["files", "mat", "mosaics"] = "files"


class LabelTable:
    """A table of label values: what each of the data set's own ids is to us.

    Args:
        classes: own id (0 to 254) → class id, or 255 to ignore it. 255 itself is always ignored.

    Examples:
        >>> LabelTable({7: 0, 8: 255})(np.array([[7, 8, 255]])).tolist()
        [[0, 255, 255]]
    """

    def __init__(self, classes: Mapping[int, int]) -> None:
        # The last entry stands for all numbers above 255, and, as index -1, for those below 0.
        self._classes = np.full(257, _UNKNOWN, np.int16)
        self._classes[IGNORE] = IGNORE
        for own, class_id in classes.items():
            self._classes[own] = class_id

    def __call__(self, labels: NDArray[Any]) -> NDArray[np.uint8]:
        """Return class ids, uint8 (H, W).

        Args:
            labels: own ids, any integer type, (H, W).

        Raises:
            InputError: for another shape or type, or values that are not in the table.
        """
        if labels.ndim != 2 or labels.dtype.kind not in "ui":
            raise InputError(f"labels are {labels.dtype} {labels.shape}, not integers (H, W)")
        classes = self._classes[np.clip(labels.astype(np.int64), -1, 256)]
        if (classes == _UNKNOWN).any():
            values = np.unique(labels[classes == _UNKNOWN]).tolist()
            more = ", ..." if len(values) > _SHOWN_VALUES else ""
            shown = ", ".join(map(str, values[:_SHOWN_VALUES]))
            raise InputError(f"label values that the data set doesn't have: {shown}{more}")
        return classes.astype(np.uint8)


def first_folder(root: Path, *names: str) -> Path | None:
    """Return the first of some folders below `root` that is there."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def files_by_stem(folder: Path | None, ending: str) -> dict[str, Path]:
    """Return the files of a folder by the part of the name before `ending`, sorted."""
    if folder is None or not folder.is_dir():
        return {}
    return {
        path.name.removesuffix(ending): path
        for path in sorted(folder.iterdir())
        if path.name.endswith(ending) and not path.name.startswith(".")
    }


def read_list(path: Path) -> list[str] | None:
    """Return the names of a split list, one a line without repetitions, or None if not there."""
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return list(dict.fromkeys(line.split()[0] for line in lines if line.split()))


def pair(
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    *,
    stems: Iterable[str] | None = None,
    images_at: str,
    labels_at: str,
    notes: Iterable[str] = (),
) -> Found:
    """Pair images and labels by stem.

    Args:
        images: image files by stem.
        labels: label files by stem; may be empty, and may hold more than is wanted.
        stems: of the split, where there is a list; without it all images.
        images_at: where images were looked for, for messages.
        labels_at: where labels were looked for, for messages.
        notes: what else a user should know.
    """
    wanted = list(images if stems is None else stems)
    notes, problems = list(notes), []
    items = [Item(s, images[s], labels.get(s)) for s in wanted if s in images]
    missing = [stem for stem in wanted if stem not in images]
    if not images:
        problems.append(f"{images_at}: no images there; check --source")
    elif missing:
        problems.append(
            f"{images_at}: {len(missing)} of {len(wanted)} listed images are not there, "
            f"the first: {missing[0]}"
        )
    elif not wanted:
        problems.append(f"{images_at}: the list of images is empty")
    unlabelled = [item.stem for item in items if item.label is None]
    if items and len(unlabelled) == len(items):
        notes.append(f"no labels: none found in {labels_at}")
    elif unlabelled:
        notes.append(
            f"{len(unlabelled)} of {len(items)} images have no label in {labels_at}, "
            f"the first: {unlabelled[0]}"
        )
    return Found(tuple(items), tuple(notes), tuple(problems))

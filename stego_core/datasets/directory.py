"""Where the images and labels of a data set lie.

`<root>/imgs/<split>/*` with optional `labels/<split>/<stem>.png` and `classes.txt`, or any flat or
nested folder or prefix of images, which then has no labels and no splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from stego_core.errors import InputError
from stego_core.storage import fs

_FEW = 20  # names that a message asks about


@dataclass(frozen=True, slots=True)
class Dataset:
    """One split of a data set.

    Attributes:
        images_uri: folder of images.
        labels_uri: folder of label files paired by stem, or None.
        class_names: of `classes.txt`, one a line; empty if there is none.
    """

    images_uri: str
    labels_uri: str | None
    class_names: tuple[str, ...] = ()

    def label_uri(self, path: str) -> str:
        """Return where the labels of the image at `path` (below the images folder) would be."""
        if self.labels_uri is None:
            raise InputError(f"{self.images_uri} has no labels")
        return fs.join(self.labels_uri, label_path(path))


def label_path(path: str) -> str:
    """Return the path of an image's label below the labels folder: same folder, same stem.

    >>> label_path("city/a.b.jpg")
    'city/a.b.png'
    """
    return str(PurePosixPath(path).with_suffix(".png"))


def open_dataset(root: str, split: str) -> Dataset:
    """Find images and labels of a split.

    Raises:
        InputError: if the root or the split is not there (the splits that are there are named), or
            `classes.txt` can't be read.
    """
    if not fs.is_folder(root):
        raise InputError(f"{root}: no such folder or prefix; check --data.root")
    if not fs.is_folder(fs.join(root, "imgs")):
        return Dataset(images_uri=root, labels_uri=None)
    images = fs.join(root, "imgs", split)
    if not fs.is_folder(images):
        names = fs.list_names(fs.join(root, "imgs"))
        splits = [name for name in names[:_FEW] if fs.is_folder(fs.join(root, "imgs", name))]
        if not splits and names:
            raise InputError(
                f"{images}: no such split; there are none: give --data.root {root}/imgs"
            )
        there = ", ".join(splits) or "none"
        raise InputError(f"{images}: no such split; there are: {there} (--data.split)")
    labels = fs.join(root, "labels", split)
    return Dataset(
        images_uri=images,
        labels_uri=labels if fs.is_folder(labels) else None,
        class_names=_class_names(fs.join(root, "classes.txt")),
    )


def _class_names(uri: str) -> tuple[str, ...]:
    try:
        text = (fs.read_if_exists(uri) or b"").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{uri} is not UTF-8: save it in that encoding") from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())

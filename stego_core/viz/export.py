"""Masks as files beside nothing but their pictures' names: label PNGs and overlays in one tree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import PurePosixPath
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from stego_core.errors import ImageProblem, InputError
from stego_core.images.apart import ApartDecoder
from stego_core.images.decode import ImageFailure
from stego_core.masks.classes import Classes
from stego_core.masks.codec import decode_mask, encode_mask
from stego_core.storage import fs
from stego_core.storage.names import below
from stego_core.storage.retry import is_passing
from stego_core.viz.overlay import encode_jpeg, overlay, resize_labels

_drawing = Lock()  # one at a time in a process: a large picture takes 60 bytes a pixel
INDEX_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("image_uri", pa.string()),
        ("status", pa.string()),
        ("label", pa.string()),
        ("overlay", pa.string()),
        ("detail", pa.string()),
    ]
)
_LONGEST = 200  # bytes of a part of a path: file systems take 255, a temporary name 38 more


class Names:
    """Where the files of each picture go: its path with another suffix.

    Pictures that differ in their suffix alone keep it (`a.jpg.png`). What would lead out of the
    tree, or is too long for a file system, goes to `by-id/<image_id>`.

    Args:
        paths: of all pictures, below the input.
        ids: of the same pictures, in the same order.
    """

    def __init__(self, paths: Iterable[str], ids: Iterable[int]) -> None:
        hashes = (
            _hash(name(path, image_id))
            for path, image_id in zip(paths, ids, strict=True)
            for name in (_stem, _whole)
        )
        stems, wholes = np.fromiter(hashes, np.uint64).reshape(-1, 2).T
        self._shared = np.empty(0, np.uint64)
        while True:  # a whole name may be another's stem: a.jpg of a.jpg.tif
            names = np.where(np.isin(stems, self._shared), wholes, stems)
            found, counts = np.unique(names, return_counts=True)
            more = np.unique(stems[np.isin(names, found[counts > 1])])
            if np.isin(more, self._shared).all():
                break
            self._shared = np.union1d(self._shared, more)

    def of(self, path: str, image_id: int) -> str:
        """Return the path of a picture's files, without their suffix."""
        stem = _stem(path, image_id)
        place = np.searchsorted(self._shared, _hash(stem))
        is_shared = place < len(self._shared) and self._shared[place] == _hash(stem)
        return _whole(path, image_id) if is_shared else stem


def _hash(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(blake2b(name.encode(), digest_size=8).digest()))


def _stem(path: str, image_id: int) -> str:
    whole = _whole(path, image_id)
    return whole if whole != path else str(PurePosixPath(path).with_suffix(""))


def _whole(path: str, image_id: int) -> str:
    try:
        below("", path)
    except InputError:
        return f"by-id/{image_id}"
    is_long = any(len(part.encode()) > _LONGEST for part in path.split("/"))
    return f"by-id/{image_id}" if is_long else path


@dataclass(frozen=True, slots=True)
class Exporter:
    """Writes the files of one picture after the other.

    Attributes:
        out: folder or URI of the export.
        classes: what becomes of the clusters.
        at_image_size: label files have the size of the picture, else that of the stored mask.
        decoder: of the pictures, for overlays; None writes none.
    """

    out: str
    classes: Classes
    at_image_size: bool
    decoder: ApartDecoder | None

    def write(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        """Write the files of a row of the masks table; return its row of the index.

        The same row gives the same bytes.
        """
        entry = {key: row[key] for key in ("image_id", "image_uri", "status", "detail")}
        entry |= {"label": None, "overlay": None}
        if row["status"] != ImageProblem.OK:
            return entry
        stored = decode_mask(row["mask"]["bytes"])
        shape = (row["image_height"], row["image_width"]) if self.at_image_size else stored.shape
        if self.classes.is_identity and shape == stored.shape:
            data = row["mask"]["bytes"]
        else:
            labels = self.classes.apply(resize_labels(stored, *shape))
            data = encode_mask(labels, self.classes.colors)
        entry["label"] = f"labels/{name}.png"
        fs.write_bytes(fs.join(self.out, entry["label"]), data)
        if self.decoder is not None:
            entry |= self._overlay(row["image_uri"], self.classes.apply(stored), name)
        return entry

    def _overlay(self, image_uri: str, labels: np.ndarray, name: str) -> dict[str, Any]:
        assert self.decoder is not None  # noqa: S101 - else nobody asks
        try:
            data = fs.read_bytes(image_uri)
        except OSError as error:  # moved since
            if not fs.is_local(image_uri) and is_passing(error):
                raise  # the part is done again
            return {"detail": f"no overlay: {' '.join(str(error).split())[:200]}"}
        with _drawing:
            pixels = self.decoder.image(data)
            if isinstance(pixels, ImageFailure):
                return {"detail": f"no overlay: {pixels.problem.value}, {pixels.detail}"}
            jpeg = encode_jpeg(overlay(pixels, labels, self.classes.colors))
        path = f"overlays/{name}.jpg"
        fs.write_bytes(fs.join(self.out, path), jpeg)
        return {"overlay": path}

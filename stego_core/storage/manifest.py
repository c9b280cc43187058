"""The manifest: the list of inputs that a job is about, written before anything else.

A Parquet file with one row per input image. It is cut into *work units*: the images that one
process takes at a time, and what is lost when it dies. Because the units are fixed by the manifest,
every batch has the same images however many workers there are and however often a job is resumed.

A row group holds many units: every reader of a unit reads the description of all row groups first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from stego_core.errors import InputError, SchemaError
from stego_core.storage import fs
from stego_core.storage.listing import Listing
from stego_core.storage.parquet import table_bytes

MAX_IMAGES = 10_000_000
"""Of one output: what a driver can list, verify and merge in a few GB."""
_NUM_IDS = 2**63
_DIGEST, _UNITS = "stego.digest", "stego.units"
_GROUP_ROWS = 4096
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .tif .tiff .bmp .gif .heic .heif .avif .jp2 .ppm .pgm".split()
)
SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("image_uri", pa.string()),
        ("path", pa.string()),
        ("image_bytes", pa.int64()),
        ("image_etag", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest that lies in a run directory.

    Attributes:
        uri: of the Parquet file.
        runs: how many units in a row have how many images each.
        digest: of ids, sizes and etags: the fingerprint of the data.
    """

    uri: str
    runs: tuple[tuple[int, int], ...]
    digest: str

    @property
    def num_images(self) -> int:
        """Return the number of rows."""
        return sum(units * images for units, images in self.runs)

    @property
    def num_units(self) -> int:
        """Return the number of work units."""
        return sum(units for units, _ in self.runs)

    def sizes(self) -> list[int]:
        """Return the number of images of every unit."""
        return [images for units, images in self.runs for _ in range(units)]

    def read_unit(self, unit: int) -> pa.Table:
        """Return the rows of one work unit."""
        start, left = 0, unit
        for units, images in self.runs:
            if left < units:
                return fs.read_rows(self.uri, start + left * images, images)
            start, left = start + units * images, left - units
        raise IndexError(unit)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Return all rows, in manifest order."""
        return fs.read_table(self.uri, columns)


def image_id(path: str) -> int:
    """Return the stable id of an image: 63 bits of a hash of its path below the input folder.

    The same tree of pictures has the same ids wherever it lies.

    >>> image_id("a/b.jpg") == image_id("a/b.jpg") and image_id("a/b.jpg") >= 0
    True
    """
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def is_image_name(path: str) -> bool:
    """Tell whether a file counts as an input: an image suffix, or no suffix at all.

    A file with an image's name that isn't one is an input too: it becomes a quarantine row.
    """
    name = PurePosixPath(path)
    return name.suffix.lower() in IMAGE_SUFFIXES or (
        not name.suffix and not name.name.startswith("_")
    )


def list_images(
    uri: str,
    *,
    limit: int | None = None,
    fraction: float = 1.0,
    most: int | None = None,
    without: str | None = None,
) -> Listing:
    """Return the images below a folder or prefix in stable order.

    Args:
        uri: folder or prefix.
        limit: most images returned: the first ones of those that `fraction` leaves.
        fraction: share of the images to keep, (0, 1]. Which ones depends on each path alone, so
            they stay when others are added, and a smaller fraction is a part of a larger one.
        most: refuse more than this.
        without: leave out what lies below this path, which ends with a slash.

    Raises:
        InputError: if there is none, or more than `most`.
    """
    is_empty = True

    def chosen() -> Iterator[fs.ListedFile]:
        nonlocal is_empty
        for file in fs.list_files(uri):
            if without is not None and file.path.startswith(without):
                continue
            if is_image_name(file.path):
                is_empty = False
                if fraction >= 1 or image_id(file.path) < fraction * _NUM_IDS:
                    yield file

    at_most = [count for count in (limit, most and most + 1) if count is not None]
    found = Listing(islice(chosen(), min(at_most, default=None)))
    if most is not None and len(found) > most:
        raise InputError(
            f"{uri}: more than {most} images, the most of one output: give each prefix its own"
        )
    if not found and not is_empty:
        raise InputError(f"{uri}: no image is in the fraction {fraction:g}; take a larger one")
    if not found:
        raise InputError(f"{uri}: no images found; accepted endings: jpg, png, webp, tif, bmp")
    return found


def manifest_table(files: Iterable[fs.ListedFile]) -> pa.Table:
    """Return the rows of a manifest.

    Raises:
        InputError: if two files have the same id.
    """
    table = (files if isinstance(files, Listing) else Listing(files)).table
    paths = (path for batch in table.to_batches() for path in batch["path"].to_pylist())
    ids = np.fromiter(map(image_id, paths), np.int64, table.num_rows)
    if len(np.unique(ids)) != len(ids):
        # 63 bits: expected once in about 10^9 folders of 10^5 images; refuse rather than mix rows.
        raise InputError("two inputs have the same image_id; rename one of them")
    return table.add_column(0, "image_id", pa.array(ids)).select(SCHEMA.names).cast(SCHEMA)


def digest_files(files: Iterable[fs.ListedFile]) -> str:
    """Return the fingerprint of a listing: 16 hex digits over paths, sizes and etags."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.num_bytes}\0{file.etag}\n".encode())
    return digest.hexdigest()[:16]


def write_manifest(uri: str, files: Sequence[fs.ListedFile], *, unit_images: int) -> Manifest:
    """Write the manifest of a listing and return it.

    Args:
        uri: where the Parquet file goes.
        files: as `list_images` returns them.
        unit_images: images of one work unit.
    """
    manifest = Manifest(uri, equal_units(len(files), unit_images), digest_files(files))
    fs.write_bytes(uri, manifest_bytes(manifest, manifest_table(files)))
    return manifest


def equal_units(num_images: int, unit_images: int) -> tuple[tuple[int, int], ...]:
    """Return the runs of units that so many images make.

    >>> equal_units(7, 3)
    ((2, 3), (1, 1))
    """
    whole, rest = divmod(num_images, unit_images)
    return tuple((units, size) for units, size in ((whole, unit_images), (1, rest)) if units * size)


def manifest_bytes(manifest: Manifest, rows: pa.Table, **metadata: str) -> bytes:
    """Return a manifest's file.

    Args:
        manifest: what it says of itself.
        rows: all of them, with the columns of `SCHEMA`.
        metadata: more of it, by key.
    """
    told = {_DIGEST: manifest.digest, _UNITS: json.dumps(manifest.runs), **metadata}
    return table_bytes(rows.replace_schema_metadata(told), row_group_size=_GROUP_ROWS)


def read_manifest(uri: str) -> Manifest:
    """Return the manifest that lies at `uri`.

    Raises:
        SchemaError: if the file is not a manifest.
    """
    problem = f"{uri} is not a manifest; delete it and start the job again"
    try:
        footer = fs.read_footer(uri)
        schema = footer.schema.to_arrow_schema()
    except pa.ArrowInvalid as error:
        raise SchemaError(problem) from error
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    if _DIGEST not in metadata or _UNITS not in metadata or schema.names != SCHEMA.names:
        raise SchemaError(problem)
    runs = tuple((int(units), int(images)) for units, images in json.loads(metadata[_UNITS]))
    return Manifest(uri, runs, metadata[_DIGEST])

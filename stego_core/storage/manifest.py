"""The manifest: the list of inputs that a job is about, written before anything else.

A Parquet file with one row per input image. One row group is one *work unit*: the images that one
process takes at a time, and what is lost when it dies. Because the units are fixed by the manifest,
every batch has the same images however many workers there are and however often a job is resumed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from stego_core.errors import InputError, SchemaError
from stego_core.storage import fs
from stego_core.storage.parquet import refuse_extensions

_NUM_IDS = 2**63
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
        num_images: rows.
        num_units: row groups.
        digest: of ids, sizes and etags: the fingerprint of the data.
    """

    uri: str
    num_images: int
    num_units: int
    digest: str

    def read_unit(self, unit: int) -> pa.Table:
        """Return the rows of one work unit."""
        filesystem, path = fs.open_uri(self.uri)
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            return file.read_row_group(unit)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Return all rows, in manifest order."""
        filesystem, path = fs.open_uri(self.uri)
        return pq.read_table(path, filesystem=filesystem, columns=columns)


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
    uri: str, *, limit: int | None = None, fraction: float = 1.0
) -> list[fs.ListedFile]:
    """Return the images below a folder or prefix in stable order.

    Args:
        uri: folder or prefix.
        limit: most images returned: the first ones of those that `fraction` leaves.
        fraction: share of the images to keep, (0, 1]. Which ones depends on each path alone, so
            they stay when others are added, and a smaller fraction is a part of a larger one.

    Raises:
        InputError: if there is none.
    """
    found: list[fs.ListedFile] = []
    is_empty = True
    for file in fs.list_files(uri):
        if not is_image_name(file.path):
            continue
        is_empty = False
        if fraction < 1 and image_id(file.path) >= fraction * _NUM_IDS:
            continue
        found.append(file)
        if limit is not None and len(found) == limit:
            break
    if not found and not is_empty:
        raise InputError(f"{uri}: no image is in the fraction {fraction:g}; take a larger one")
    if not found:
        raise InputError(f"{uri}: no images found; accepted endings: jpg, png, webp, tif, bmp")
    return found


def _table(files: Iterable[fs.ListedFile]) -> pa.Table:
    files = list(files)
    ids = [image_id(file.path) for file in files]
    if len(set(ids)) != len(ids):
        # 63 bits: expected once in about 10^9 folders of 10^5 images; refuse rather than mix rows.
        raise InputError("two inputs have the same image_id; rename one of them")
    return pa.table(
        {
            "image_id": ids,
            "image_uri": [file.uri for file in files],
            "path": [file.path for file in files],
            "image_bytes": [file.num_bytes for file in files],
            "image_etag": [file.etag for file in files],
        },
        schema=SCHEMA,
    )


def digest_files(files: Iterable[fs.ListedFile]) -> str:
    """Return the fingerprint of a listing: 16 hex digits over paths, sizes and etags."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.num_bytes}\0{file.etag}\n".encode())
    return digest.hexdigest()[:16]


def write_manifest(uri: str, files: list[fs.ListedFile], *, unit_images: int) -> Manifest:
    """Write the manifest of a listing and return it.

    Args:
        uri: where the Parquet file goes.
        files: as `list_images` returns them.
        unit_images: images of one work unit.
    """
    digest = digest_files(files)
    table = _table(files).replace_schema_metadata({"stego.digest": digest})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=unit_images, compression="zstd")
    fs.write_bytes(uri, buffer.getvalue())
    return Manifest(uri, len(files), -(-len(files) // unit_images), digest)


def read_manifest(uri: str) -> Manifest:
    """Return the manifest that lies at `uri`.

    Raises:
        SchemaError: if the file is not a manifest.
    """
    filesystem, path = fs.open_uri(uri)
    problem = f"{uri} is not a manifest; delete it and start the job again"
    try:
        refuse_extensions(path, filesystem, name=uri)
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            metadata = file.schema_arrow.metadata or {}
            names = file.schema_arrow.names
            rows, groups = file.metadata.num_rows, file.metadata.num_row_groups
    except pa.ArrowInvalid as error:
        raise SchemaError(problem) from error
    if b"stego.digest" not in metadata or names != SCHEMA.names:
        raise SchemaError(problem)
    return Manifest(uri, rows, groups, metadata[b"stego.digest"].decode())

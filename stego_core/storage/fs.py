"""One way to reach every file: local paths, `file://`, `s3://` and what pyarrow or fsspec know.

Credentials come only from the environment, a profile or an instance role; never from a URI.
"""

from __future__ import annotations

import os
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from stego_core.storage.parquet import refuse_extensions
from stego_core.storage.retry import repeated
from stego_core.storage.uris import is_local, join, local_path, open_uri, told
from stego_core.storage.walk import ListedFile, list_files, list_names

__all__ = [
    "ListedFile",
    "is_local",
    "join",
    "list_files",
    "list_names",
    "local_path",
    "open_uri",
]


def read_bytes(uri: str, num_bytes: int | None = None) -> bytes:
    """Return the whole content of a file, or its first bytes.

    Raises:
        FileNotFoundError, PermissionError, OSError: as the filesystem reports them.
    """
    filesystem, path = open_uri(uri)

    def read() -> bytes:
        with filesystem.open_input_file(path) as stream:
            return stream.read(num_bytes)  # type: ignore[no-any-return]

    return repeated(uri, read)


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Return a Parquet file of plain columns, or the named columns of it.

    Raises:
        SchemaError: if it names an extension type, as for the next two.
    """
    filesystem, path = open_uri(uri)

    def read() -> pa.Table:
        refuse_extensions(path, filesystem, name=uri)
        return pq.read_table(path, filesystem=filesystem, columns=columns, partitioning=None)

    return repeated(uri, read)


def read_footer(uri: str) -> pq.FileMetaData:
    """Return what the end of a Parquet file says: schema, metadata, rows, row groups."""
    filesystem, path = open_uri(uri)

    def read() -> pq.FileMetaData:
        refuse_extensions(path, filesystem, name=uri)
        return pq.read_metadata(path, filesystem=filesystem)

    return repeated(uri, read)


def read_rows(uri: str, start: int, count: int) -> pa.Table:
    """Return rows of a Parquet file; only their row groups are read."""
    filesystem, path = open_uri(uri)

    def read() -> pa.Table:
        refuse_extensions(path, filesystem, name=uri)
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            ends = list(accumulate(sizes))
            first, last = bisect_right(ends, start), bisect_left(ends, start + count)
            offset = start - (ends[first] - sizes[first])
            return file.read_row_groups(range(first, last + 1)).slice(offset, count)

    return repeated(uri, read)


def row_groups(uri: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield a Parquet file's row groups, or the named columns of them, one at a time."""
    filesystem, path = open_uri(uri)

    def read(group: int) -> pa.Table:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            return file.read_row_group(group, columns)

    for group in range(read_footer(uri).num_row_groups):
        yield repeated(uri, partial(read, group))


def read_if_exists(uri: str) -> bytes | None:
    """Return the whole content of a file, or None if there is no such file."""
    with suppress(FileNotFoundError):
        return read_bytes(uri)
    return None


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Local files are written beside the target and renamed; an object store shows an object only
    when its upload is complete.
    """
    if is_local(uri):
        _write_local(local_path(uri), data)
        return
    filesystem, key = open_uri(uri)

    def write() -> None:
        with filesystem.open_output_stream(key) as stream:
            stream.write(data)

    repeated(uri, write)


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unique among threads and machines that share the folder; not `tempfile`, whose files are
    # readable by their owner only.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def exists(uri: str) -> bool:
    """Tell whether a file or folder is there; InputError if the store refuses to say."""
    return bool(_kind(uri) != pafs.FileType.NotFound)


def is_folder(uri: str) -> bool:
    """Tell whether `uri` is a folder or a non-empty prefix; InputError if the store refuses to."""
    return bool(_kind(uri) == pafs.FileType.Directory)


def _kind(uri: str) -> pafs.FileType:
    filesystem, path = open_uri(uri)
    with told(uri, "can't be looked up"):
        return repeated(uri, lambda: filesystem.get_file_info(path.rstrip("/") or "/").type)


def free_bytes(uri: str) -> int | None:
    """Return what is free on the disk where a folder is or would be; None of a store."""
    if not is_local(uri):
        return None
    path = local_path(uri).absolute()
    there = next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))
    return shutil.disk_usage(there).free


def delete(uri: str) -> None:
    """Delete a file or a folder with all below it; nothing happens if it isn't there."""
    filesystem, path = open_uri(uri)

    def remove() -> None:
        kind = filesystem.get_file_info(path).type
        # A repetition finds it gone where only the answer was lost.
        with suppress(FileNotFoundError):
            if kind == pafs.FileType.Directory:
                filesystem.delete_dir(path)
            elif kind == pafs.FileType.File:
                filesystem.delete_file(path)

    repeated(uri, remove)

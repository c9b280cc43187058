"""One way to reach every file: local paths, `file://`, `s3://` and what pyarrow or fsspec know.

Credentials come only from the environment, a profile or an instance role; never from a URI.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from stego_core.errors import InputError
from stego_core.storage.parquet import refuse_extensions
from stego_core.storage.retry import DENIED, GONE, retried
from stego_core.storage.uris import is_local, join, local_path, open_uri, s3_client, split, told

__all__ = ["is_local", "join", "local_path", "open_uri"]

_LIST_ATTEMPTS = 12  # of a page of a listing
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class ListedFile:
    """One file of a listing.

    Attributes:
        uri: what `read_bytes` takes.
        path: relative to the listed folder, with forward slashes.
        num_bytes: size.
        etag: changes when the content does: the store's etag, or modification time and size.
    """

    uri: str
    path: str
    num_bytes: int
    etag: str


def read_bytes(uri: str, num_bytes: int | None = None) -> bytes:
    """Return the whole content of a file, or its first bytes.

    Raises:
        FileNotFoundError, PermissionError, OSError: as the filesystem reports them.
    """
    filesystem, path = open_uri(uri)

    def read() -> bytes:
        with filesystem.open_input_file(path) as stream:
            return stream.read(num_bytes)  # type: ignore[no-any-return]

    return _repeated(uri, read)


def _repeated(uri: str, operation: Callable[[], _Result]) -> _Result:
    """Run an operation that can be repeated; local ones fail for good."""
    try:
        return operation() if is_local(uri) else retried(operation)
    except OSError as error:
        if any(word in str(error) for word in DENIED):
            raise PermissionError(str(error)) from error
        if any(word in str(error) for word in GONE):
            raise FileNotFoundError(str(error)) from error
        raise


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Return a Parquet file of plain columns, or the named columns of it.

    Raises:
        SchemaError: if it names an extension type, as for the next two.
    """
    filesystem, path = open_uri(uri)

    def read() -> pa.Table:
        refuse_extensions(path, filesystem, name=uri)
        return pq.read_table(path, filesystem=filesystem, columns=columns, partitioning=None)

    return _repeated(uri, read)


def read_footer(uri: str) -> pq.FileMetaData:
    """Return what the end of a Parquet file says: schema, metadata, rows, row groups."""
    filesystem, path = open_uri(uri)

    def read() -> pq.FileMetaData:
        refuse_extensions(path, filesystem, name=uri)
        return pq.read_metadata(path, filesystem=filesystem)

    return _repeated(uri, read)


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

    return _repeated(uri, read)


def row_groups(uri: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield a Parquet file's row groups, or the named columns of them, one at a time."""
    filesystem, path = open_uri(uri)

    def read(group: int) -> pa.Table:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            return file.read_row_group(group, columns)

    for group in range(read_footer(uri).num_row_groups):
        yield _repeated(uri, partial(read, group))


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

    _repeated(uri, write)


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
        return _repeated(uri, lambda: filesystem.get_file_info(path.rstrip("/") or "/").type)


def list_names(uri: str) -> list[str]:
    """Return the sorted names directly below a folder, none if there is no folder.

    Raises:
        InputError: if the folder can't be listed.
    """
    filesystem, path = open_uri(uri)
    selector = pafs.FileSelector(path.rstrip("/"), allow_not_found=True)
    with told(uri, "can't be listed"):
        infos = _repeated(uri, lambda: filesystem.get_file_info(selector))
        return sorted(info.base_name for info in infos)


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

    _repeated(uri, remove)


def list_files(uri: str) -> Iterator[ListedFile]:
    """Yield every file below a folder or prefix, in an order that never changes.

    Hidden files and folders (leading dot) are passed over.

    Raises:
        InputError: if folder or bucket is not there or can't be read, or a name is not UTF-8.
    """
    if is_local(uri):
        yield from _list_local(local_path(uri))
    elif split(uri)[0] in ("s3", "s3a"):
        yield from _list_s3(uri)
    else:
        yield from _list_other(uri)


def _list_local(root: Path) -> Iterator[ListedFile]:
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give an existing folder or URI")
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith(".") or not path.is_file():
                continue
            if not _is_utf8(name) or not _is_utf8(folder):
                raise InputError(f"{str(path)!a}: the name is not UTF-8; rename the file or folder")
            stat = path.stat()
            yield ListedFile(
                uri=str(path),
                path=path.relative_to(root).as_posix(),
                num_bytes=stat.st_size,
                etag=f"{stat.st_mtime_ns:x}-{stat.st_size:x}",
            )


def _is_utf8(name: str) -> bool:
    # Other bytes of a name are lone surrogates in Python, which no table can hold.
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _list_s3(uri: str) -> Iterator[ListedFile]:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = split(uri)[1].partition("/")
    prefix = f"{prefix.strip('/')}/".lstrip("/")
    retries = {"mode": "standard", "total_max_attempts": _LIST_ATTEMPTS}
    pages = s3_client(retries=retries).get_paginator("list_objects_v2")
    found = False
    with told(uri, "can't be listed", (ClientError, BotoCoreError)):
        for page in pages.paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                found = True
                path = entry["Key"].removeprefix(prefix)
                if path.endswith("/") or _is_hidden(path):
                    continue
                key_uri, etag = f"s3://{bucket}/{entry['Key']}", entry["ETag"].strip('"')
                yield ListedFile(uri=key_uri, path=path, num_bytes=entry["Size"], etag=etag)
    if not found:
        raise InputError(f"{uri}: nothing below this prefix; check bucket and prefix")


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _list_other(uri: str) -> Iterator[ListedFile]:
    filesystem, root = open_uri(uri)
    with told(uri, "can't be listed"):
        for info in _walk(uri, filesystem, root):
            path = info.path.removeprefix(root).lstrip("/")
            etag = f"{info.mtime_ns or 0:x}-{info.size:x}"
            yield ListedFile(join(uri, path), path, info.size, etag)


def _walk(uri: str, filesystem: pafs.FileSystem, folder: str) -> Iterator[pafs.FileInfo]:
    """List a folder at a time, in the order of whole paths: only one folder's names are held."""
    infos = _repeated(uri, lambda: filesystem.get_file_info(pafs.FileSelector(folder)))
    named = {f"{i.path}/" if i.type == pafs.FileType.Directory else i.path: i for i in infos}
    for path in sorted(p for p, info in named.items() if not info.base_name.startswith(".")):
        yield from _walk(uri, filesystem, path[:-1]) if path.endswith("/") else [named[path]]

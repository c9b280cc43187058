"""What lies below a folder or prefix: names, and files in an order that never changes."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from stat import S_ISREG

import pyarrow.fs as pafs

from stego_core.errors import InputError
from stego_core.storage.retry import repeated
from stego_core.storage.uris import (
    google_client,
    is_local,
    join,
    local_path,
    open_uri,
    s3_client,
    split,
    told,
)

logger = logging.getLogger(__name__)

_NAMED_LINKS = 5
_ESCAPED = re.compile(r"\\x[89a-f][0-9a-f]")  # a byte of a name that is not UTF-8
_LIST_ATTEMPTS = 12  # of a page of a listing
_GOOGLE_FIELDS = "items(name,size,generation),nextPageToken"
# Of a file that is gone since it was listed, or a link to nothing or to itself.
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


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


def list_names(uri: str) -> list[str]:
    """Return the sorted names directly below a folder, none if there is no folder.

    Raises:
        InputError: if the folder can't be listed.
    """
    filesystem, path = open_uri(uri)
    folder = path.rstrip("/")
    is_all = _hides_folders(filesystem)
    selector = pafs.FileSelector(folder, allow_not_found=True, recursive=is_all)
    with told(uri, "can't be listed"):
        infos = repeated(uri, lambda: filesystem.get_file_info(selector))
        return sorted({info.path[len(folder) :].strip("/").partition("/")[0] for info in infos})


def list_files(uri: str) -> Iterator[ListedFile]:
    """Yield every file below a folder or prefix, in an order that never changes.

    Hidden files and folders (leading dot) are passed over, and, with a warning, links to folders.
    A local name that is not UTF-8 is listed as `escaped` tells, and can't be read.

    Raises:
        InputError: if folder or bucket is not there or can't be read, or its name is not UTF-8.
    """
    if is_local(uri):
        yield from _list_local(local_path(uri))
    elif split(uri)[0] in ("s3", "s3a"):
        yield from _list_s3(uri)
    elif split(uri)[0] in ("gs", "gcs") and _has_google_client():
        yield from _list_google(uri)  # without that package pyarrow lists, and holds, all names
    else:
        yield from _list_other(uri)


def _list_local(root: Path) -> Iterator[ListedFile]:
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give an existing folder or URI")
    if escaped(str(root)) != str(root):
        raise InputError(f"{escaped(str(root))}: its name is not UTF-8; rename the folder")
    links = count()
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        _warn_of_links(folder, subfolders, links)
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith("."):
                continue
            try:
                stat = path.stat()
            except OSError as error:
                if error.errno in _NOTHING_THERE:
                    continue
                raise
            if not S_ISREG(stat.st_mode):
                continue
            yield ListedFile(
                uri=escaped(str(path)),
                path=escaped(path.relative_to(root).as_posix()),
                num_bytes=stat.st_size,
                etag=f"{stat.st_mtime_ns:x}-{stat.st_size:x}",
            )


def _warn_of_links(folder: str, names: list[str], numbers: Iterator[int]) -> None:
    """Name the first links to folders: nobody else would say why pictures are missing."""
    links = [path for name in names if (path := Path(folder, name)).is_symlink()]
    for link, number in zip(links, numbers, strict=False):
        if number < _NAMED_LINKS:
            name = escaped(str(link))
            logger.warning("%s is a link to a folder: what is there is left out", name)


def _refuse(error: OSError) -> None:
    name = escaped(str(error.filename))
    raise InputError(f"{name} can't be listed ({error.strerror}): allow it, or move it")


def escaped(name: str) -> str:
    r"""Return a local name as a table can hold it: bytes that are not UTF-8 as `\xff`.

    >>> print(escaped(os.fsdecode(b"caf\xe9.jpg")), escaped("café.jpg"))
    caf\xe9.jpg café.jpg
    """
    return os.fsencode(name).decode(errors="backslashreplace")


def is_readable_name(uri: str) -> bool:
    """Tell whether a listed file has the name that `list_files` gave it (see `escaped`)."""
    return not (is_local(uri) and _ESCAPED.search(uri) and not local_path(uri).exists())


def _list_s3(uri: str) -> Iterator[ListedFile]:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, prefix = _bucket_and_prefix(uri)
    retries = {"mode": "standard", "total_max_attempts": _LIST_ATTEMPTS}
    pages = s3_client(retries=retries).get_paginator("list_objects_v2")
    with told(uri, "can't be listed", (ClientError, BotoCoreError)):
        yield from _objects(
            uri,
            (
                (entry["Key"], entry["Size"], entry["ETag"].strip('"'))
                for page in pages.paginate(Bucket=bucket, Prefix=prefix)
                for entry in page.get("Contents", [])
            ),
        )


def _has_google_client() -> bool:
    with suppress(ModuleNotFoundError):  # of a package above it
        return find_spec("google.cloud.storage") is not None
    return False


def _list_google(uri: str) -> Iterator[ListedFile]:
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    bucket, prefix = _bucket_and_prefix(uri)
    with told(uri, "can't be listed", (GoogleAPIError, GoogleAuthError, OSError)):
        blobs = google_client().list_blobs(bucket, prefix=prefix, fields=_GOOGLE_FIELDS)
        yield from _objects(uri, ((b.name, b.size, str(b.generation)) for b in blobs))


def _bucket_and_prefix(uri: str) -> tuple[str, str]:
    bucket, _, prefix = split(uri)[1].partition("/")
    if not bucket:
        raise InputError(f"{uri} names no bucket; give {split(uri)[0]}://bucket/prefix")
    return bucket, f"{prefix.strip('/')}/".lstrip("/")


def _objects(uri: str, objects: Iterable[tuple[str, int, str]]) -> Iterator[ListedFile]:
    """Yield the objects (name, bytes, etag) that are files; a store lists them by name."""
    scheme, (bucket, prefix) = split(uri)[0], _bucket_and_prefix(uri)
    found = False
    for name, num_bytes, etag in objects:
        found = True
        path = name.removeprefix(prefix)
        if not path.endswith("/") and not _is_hidden(path):
            yield ListedFile(f"{scheme}://{bucket}/{name}", path, num_bytes, etag)
    if not found:
        raise InputError(f"{uri}: nothing below this prefix; check bucket and prefix")


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _list_other(uri: str) -> Iterator[ListedFile]:
    filesystem, root = open_uri(uri)
    with told(uri, "can't be listed"):
        for info in _walk(uri, filesystem, root):
            path = info.path.removeprefix(root).lstrip("/")
            if not _is_hidden(path):
                etag = f"{info.mtime_ns or 0:x}-{info.size:x}"
                yield ListedFile(join(uri, path), path, info.size, etag)


def _walk(uri: str, filesystem: pafs.FileSystem, folder: str) -> Iterator[pafs.FileInfo]:
    """List a folder at a time, in the order of whole paths: no more names are held at a time."""
    is_all = _hides_folders(filesystem)
    selector = pafs.FileSelector(folder, recursive=is_all)
    infos = repeated(uri, lambda: filesystem.get_file_info(selector))
    named = {f"{i.path}/" if i.type == pafs.FileType.Directory else i.path: i for i in infos}
    for path in sorted(named):
        if named[path].type == pafs.FileType.File:
            yield named[path]
        elif path.endswith("/") and not is_all and not named[path].base_name.startswith("."):
            yield from _walk(uri, filesystem, path[:-1])


def _hides_folders(filesystem: pafs.FileSystem) -> bool:
    """Tell whether it lists only folders that an object stands for: then all must be listed."""
    return bool(filesystem.type_name == "gcs")

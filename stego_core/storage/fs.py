"""One way to reach every file: local paths, `file://`, `s3://` and what pyarrow or fsspec know.

Credentials come only from the environment, a profile or an instance role; never from a URI.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pyarrow.fs as pafs

from stego_core.errors import InputError

_CONNECT_TIMEOUT_S, _REQUEST_TIMEOUT_S = 10, 60
_READ_ATTEMPTS = 10
_URI = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.IGNORECASE | re.DOTALL)


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


def _split(uri: str) -> tuple[str, str]:
    # Not urlsplit: names of objects may hold '#' and '?', which it would cut off.
    match = _URI.fullmatch(uri)
    return (match[1].lower(), match[2]) if match else ("", uri)


def is_local(uri: str) -> bool:
    """Tell whether `uri` is a local path or a `file://` URI."""
    return _split(uri)[0] in ("", "file")


def local_path(uri: str) -> Path:
    """Return the local path of a local URI.

    Raises:
        InputError: if the URI is not local.
    """
    if not is_local(uri):
        raise InputError(f"{uri} is not a local path")
    return Path(_split(uri)[1]).expanduser()


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI or local path.

    >>> join("s3://bucket/run/", "masks", "part-00000.parquet")
    's3://bucket/run/masks/part-00000.parquet'
    """
    return "/".join([uri.rstrip("/"), *parts]) or "/"


@lru_cache(maxsize=32)
def _s3(bucket: str) -> pafs.FileSystem:
    # The bucket is part of the key so that buckets of different regions get clients of their own.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {}
    if endpoint:
        parts = urlsplit(endpoint)
        options.update(endpoint_override=parts.netloc, scheme=parts.scheme)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options["region"] = region
    elif not endpoint:
        with _told(f"s3://{bucket}", "has no region that can be found (AWS_REGION sets it)"):
            options["region"] = pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_REQUEST_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_READ_ATTEMPTS),
        **options,
    )


@contextmanager
def _told(
    uri: str, problem: str, errors: tuple[type[Exception], ...] = (OSError, ValueError)
) -> Iterator[None]:
    """Make an error of the store, which may be wrong credentials, one that a user can read."""
    try:
        yield
    except errors as error:
        raise InputError(f"{uri} {problem}: {' '.join(str(error).split())}") from error


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of `uri` and the path inside it.

    Raises:
        InputError: if no filesystem knows the scheme, or an S3 URI names no bucket.
    """
    if is_local(uri):
        return pafs.LocalFileSystem(), str(local_path(uri).absolute())
    scheme, path = _split(uri)
    if scheme in ("s3", "s3a"):
        bucket = path.partition("/")[0]
        if not bucket:
            raise InputError(f"{uri} names no bucket; give s3://bucket/prefix")
        return _s3(bucket), path
    try:
        return pafs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    except (ValueError, OSError) as error:
        import fsspec

        if scheme not in fsspec.available_protocols():
            raise InputError(f"{uri}: no filesystem knows '{scheme}://'") from error
        filesystem, path = fsspec.core.url_to_fs(uri)
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def read_bytes(uri: str, num_bytes: int | None = None) -> bytes:
    """Return the whole content of a file, or its first bytes.

    Raises:
        FileNotFoundError, PermissionError, OSError: as the filesystem reports them.
    """
    filesystem, path = open_uri(uri)
    try:
        with filesystem.open_input_file(path) as stream:
            return stream.read(num_bytes)  # type: ignore[no-any-return]
    except OSError as error:
        if "ACCESS_DENIED" in str(error):  # pyarrow has no class of its own for it
            raise PermissionError(str(error)) from error
        raise


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
    with filesystem.open_output_stream(key) as stream:
        stream.write(data)


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
    with _told(uri, "can't be looked up"):
        return filesystem.get_file_info(path.rstrip("/") or "/").type


def list_names(uri: str) -> list[str]:
    """Return the sorted names directly below a folder, none if there is no folder.

    Raises:
        InputError: if the folder can't be listed.
    """
    filesystem, path = open_uri(uri)
    selector = pafs.FileSelector(path.rstrip("/"), allow_not_found=True)
    with _told(uri, "can't be listed"):
        return sorted(info.base_name for info in filesystem.get_file_info(selector))


def delete(uri: str) -> None:
    """Delete a file or a folder with all below it; nothing happens if it isn't there."""
    filesystem, path = open_uri(uri)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind == pafs.FileType.File:
        filesystem.delete_file(path)


def list_files(uri: str) -> Iterator[ListedFile]:
    """Yield every file below a folder or prefix, in an order that never changes.

    Hidden files and folders (leading dot) are passed over.

    Raises:
        InputError: if folder or bucket is not there or can't be read, or a name is not UTF-8.
    """
    if is_local(uri):
        yield from _list_local(local_path(uri))
    elif _split(uri)[0] in ("s3", "s3a"):
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
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = _split(uri)[1].partition("/")
    prefix = f"{prefix.strip('/')}/".lstrip("/")
    pages = boto3.client("s3").get_paginator("list_objects_v2")
    found = False
    with _told(uri, "can't be listed", (ClientError, BotoCoreError)):
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
    with _told(uri, "can't be listed"):
        infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    scheme = _split(uri)[0]
    for info in sorted(infos, key=lambda info: str(info.path)):
        path = info.path.removeprefix(root).lstrip("/")
        if info.type == pafs.FileType.File and not _is_hidden(path):
            etag = f"{info.mtime_ns or 0:x}-{info.size:x}"
            yield ListedFile(f"{scheme}://{info.path}", path, info.size, etag)

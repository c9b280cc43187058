"""One way to reach every file: local paths, `file://`, `s3://` and what pyarrow or fsspec know.

Credentials come only from the environment, a profile or an instance role; never from a URI.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pyarrow.fs as pafs

from stego_core.errors import InputError

_CONNECT_TIMEOUT_S = 10
_REQUEST_TIMEOUT_S = 60
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
        options["region"] = pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_REQUEST_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_READ_ATTEMPTS),
        **options,
    )


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of `uri` and the path inside it.

    Raises:
        InputError: if no filesystem knows the scheme.
    """
    if is_local(uri):
        return pafs.LocalFileSystem(), str(local_path(uri).absolute())
    scheme, path = _split(uri)
    if scheme in ("s3", "s3a"):
        return _s3(path.partition("/")[0]), path
    try:
        return pafs.FileSystem.from_uri(uri)  # type: ignore[no-any-return]
    except (ValueError, OSError) as error:
        import fsspec

        if scheme not in fsspec.available_protocols():
            raise InputError(f"{uri}: no filesystem knows '{scheme}://' ({error})") from error
        filesystem, path = fsspec.core.url_to_fs(uri)
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def read_bytes(uri: str) -> bytes:
    """Return the whole content of a file.

    Raises:
        FileNotFoundError, PermissionError, OSError: as the filesystem reports them.
    """
    filesystem, path = open_uri(uri)
    with filesystem.open_input_file(path) as stream:
        return stream.read()  # type: ignore[no-any-return]


def read_if_exists(uri: str) -> bytes | None:
    """Return the whole content of a file, or None if there is no such file."""
    try:
        return read_bytes(uri)
    except FileNotFoundError:
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
    """Tell whether a file or folder is there."""
    filesystem, path = open_uri(uri)
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def is_folder(uri: str) -> bool:
    """Tell whether `uri` is a folder or a prefix with objects below it."""
    filesystem, path = open_uri(uri)
    return bool(filesystem.get_file_info(path.rstrip("/")).type == pafs.FileType.Directory)


def list_names(uri: str) -> list[str]:
    """Return the sorted names directly below a folder; empty if there is none."""
    filesystem, path = open_uri(uri)
    selector = pafs.FileSelector(path.rstrip("/"), allow_not_found=True)
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
        InputError: if the folder is not there, can't be read, or the bucket does not exist, or a
            local name is not UTF-8.
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
    prefix = prefix.strip("/")
    prefix = f"{prefix}/" if prefix else ""
    pages = boto3.client("s3").get_paginator("list_objects_v2")
    found = False
    try:
        for page in pages.paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                found = True
                path = entry["Key"].removeprefix(prefix)
                if path.endswith("/") or _is_hidden(path):
                    continue
                etag = entry["ETag"].strip('"')
                key_uri = f"s3://{bucket}/{entry['Key']}"
                yield ListedFile(uri=key_uri, path=path, num_bytes=entry["Size"], etag=etag)
    except (ClientError, BotoCoreError) as error:
        raise InputError(f"{uri} can't be listed: {error}") from error
    if not found:
        raise InputError(f"{uri}: nothing below this prefix; check bucket and prefix")


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _list_other(uri: str) -> Iterator[ListedFile]:
    filesystem, root = open_uri(uri)
    try:
        infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    except OSError as error:
        raise InputError(f"{uri} can't be listed: {error}") from error
    scheme = _split(uri)[0]
    for info in sorted(infos, key=lambda info: str(info.path)):
        path = info.path.removeprefix(root).lstrip("/")
        if info.type == pafs.FileType.File and not _is_hidden(path):
            etag = f"{info.mtime_ns or 0:x}-{info.size:x}"
            yield ListedFile(f"{scheme}://{info.path}", path, info.size, etag)

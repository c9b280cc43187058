"""URIs and their filesystems: local paths, `file://`, `s3://`, what pyarrow or fsspec know.

Credentials come only from the environment, a profile or an instance role; never from a URI.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from stego_core.errors import InputError

_CONNECT_TIMEOUT_S, _REQUEST_TIMEOUT_S = 10, 60
_SDK_ATTEMPTS = 3  # of a single request; `retried` repeats the whole operation
_ADDRESSING = "STEGO_S3_ADDRESSING"
_URI = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.IGNORECASE | re.DOTALL)


def split(uri: str) -> tuple[str, str]:
    """Return scheme (none for a plain path) and the rest."""
    # Not urlsplit: names of objects may hold '#' and '?', which it would cut off.
    match = _URI.fullmatch(uri)
    return (match[1].lower(), match[2]) if match else ("", uri)


def is_local(uri: str) -> bool:
    """Tell whether `uri` is a local path or a `file://` URI."""
    return split(uri)[0] in ("", "file")


def local_path(uri: str) -> Path:
    """Return the local path of a local URI.

    Raises:
        InputError: if the URI is not local.
    """
    if not is_local(uri):
        raise InputError(f"{uri} is not a local path")
    return Path(split(uri)[1]).expanduser()


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI or local path.

    >>> join("s3://bucket/run/", "masks", "part-00000.parquet")
    's3://bucket/run/masks/part-00000.parquet'
    """
    _, rest = split(uri)
    if rest != uri and not rest.strip("/"):
        return uri + "/".join(parts)  # the root of a store without a bucket, such as memory://
    return "/".join([uri.rstrip("/"), *parts]) or "/"


@lru_cache(maxsize=32)
def _s3(bucket: str) -> pafs.FileSystem:
    # The bucket is part of the key so that buckets of different regions get clients of their own.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {}
    if endpoint:
        parts = urlsplit(endpoint)
        options.update(endpoint_override=parts.netloc, scheme=parts.scheme)
    if region := _region():
        options["region"] = region
    elif not endpoint:
        with told(f"s3://{bucket}", "has no region that can be found (AWS_REGION sets it)"):
            options["region"] = pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        anonymous=_is_anonymous("S3"),
        force_virtual_addressing=_addressing() == "virtual",
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_REQUEST_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_SDK_ATTEMPTS),
        **options,
    )


def s3_client(**options: Any) -> Any:
    """Return a client of boto3 that reaches what `open_uri` does.

    Args:
        options: of botocore's `Config`.
    """
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    if _is_anonymous("S3"):
        options["signature_version"] = UNSIGNED
    if (style := _addressing()) != "auto":  # else a profile's own, or the path at an endpoint
        options["s3"] = {"addressing_style": style}
    return boto3.client("s3", region_name=_region(), config=Config(**options))


def _region() -> str | None:
    # boto3 itself knows the second name only; without either it asks the profile.
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


@lru_cache(maxsize=1)
def _gcs() -> pafs.FileSystem:
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    options: dict[str, Any] = {}
    if emulator:  # as Google's own clients: nobody signs requests to one
        parts = urlsplit(emulator if "://" in emulator else f"http://{emulator}")
        options.update(endpoint_override=parts.netloc, scheme=parts.scheme)
    return pafs.GcsFileSystem(
        anonymous=bool(emulator) or _is_anonymous("GS"),
        # Of a single request, which `retried` repeats; its own default is a quarter of an hour.
        retry_time_limit=timedelta(seconds=_CONNECT_TIMEOUT_S),
        **options,
    )


def google_client() -> Any:
    """Return a client of google-cloud-storage that reaches what `open_uri` does."""
    from google.cloud import storage

    if os.environ.get("STORAGE_EMULATOR_HOST") or _is_anonymous("GS"):
        return storage.Client.create_anonymous_client()
    return storage.Client()


def _is_anonymous(store: str) -> bool:
    return os.environ.get(f"STEGO_{store}_ANONYMOUS", "").lower() in ("1", "true", "yes")


def _addressing() -> str:
    style = os.environ.get(_ADDRESSING, "auto")
    if style not in ("auto", "virtual"):
        raise InputError(f"{_ADDRESSING} is {style!r}: set it to auto or virtual, or not at all")
    return style


@contextmanager
def told(
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
        InputError: if no filesystem knows the scheme, or a URI of S3 or Google names no bucket.
    """
    if is_local(uri):
        return pafs.LocalFileSystem(), str(local_path(uri).absolute())
    scheme, path = split(uri)
    if scheme in ("s3", "s3a", "gs", "gcs"):
        bucket, _, rest = path.partition("/")
        if not bucket:
            raise InputError(f"{uri} names no bucket; give {scheme}://bucket/prefix")
        return (_gcs(), path if rest else bucket) if scheme.startswith("g") else (_s3(bucket), path)
    authority, _, rest = path.partition("/")
    try:
        filesystem, root = _other(scheme, authority)
    except (ValueError, OSError) as error:
        return _fsspec(uri, scheme, error)
    # Not from_uri of the whole: it decodes '%' and cuts at '#' and '?', which names may hold.
    return filesystem, f"{root.rstrip('/')}/{rest}" if rest else root or "/"


@lru_cache(maxsize=32)
def _other(scheme: str, authority: str) -> tuple[pafs.FileSystem, str]:
    """Return a filesystem of pyarrow and its path of `scheme://authority`."""
    return pafs.FileSystem.from_uri(f"{scheme}://{authority}")  # type: ignore[no-any-return]


def _fsspec(uri: str, scheme: str, error: Exception) -> tuple[pafs.FileSystem, str]:
    import fsspec

    if scheme not in fsspec.available_protocols():
        raise InputError(f"{uri}: no filesystem knows '{scheme}://'") from error
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ImportError, OSError, ValueError) as other:
        reasons = " ".join(f"{other}; {error}".split())
        raise InputError(f"{uri} can't be opened: {reasons}") from other
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path

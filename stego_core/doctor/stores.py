"""Input and output as the jobs use them, and the clock against that of the store."""

from __future__ import annotations

import email.utils
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from stego_core.doctor.findings import Finding, State
from stego_core.errors import ConfigError, InputError
from stego_core.storage import fs
from stego_core.storage.walk import is_readable_name

_HEAD_TIMEOUT_S = 10.0
# S3 refuses requests that are signed a quarter of an hour off.
ADVISED_SKEW_S, MAX_SKEW_S = 60.0, 600.0


def check_input(uri: str) -> Iterator[Finding]:
    """Read the first file below an input.

    Raises:
        InputError: if it can't be listed, or nobody answers where its store should be.
    """
    _require_answer(uri)
    files = (file for file in fs.list_files(uri) if is_readable_name(file.uri))
    first = next(files, None)
    if first is None:
        advice = "give a folder or URI with images"
        yield Finding("input", State.FAIL, f"{uri} holds no file", advice, InputError.exit_code)
        return
    try:
        data = fs.read_bytes(first.uri)
    except OSError as error:
        found = f"{first.uri} can't be read: {_reason(error)}"
        yield Finding("input", State.FAIL, found, "allow reading", InputError.exit_code)
        return
    yield Finding("input", State.OK, f"{uri}: listed; {first.path} read, {len(data)} bytes")


def check_out(uri: str) -> Iterator[Finding]:
    """Write, read and delete a small file below an output, and leave nothing.

    Raises:
        InputError: if nobody answers where its store should be.
    """
    _require_answer(uri)
    name, data = f"doctor-{uuid4().hex}.tmp", b"may be deleted"
    try:
        made = _missing_folders(uri)
        try:
            fs.write_bytes(fs.join(uri, name), data)
            read = fs.read_bytes(fs.join(uri, name))
            fs.delete(fs.join(uri, name))
            is_left = fs.exists(fs.join(uri, name))
        finally:
            _remove(made)
    except (OSError, InputError) as error:
        found = f"{uri}: can't be written to: {_reason(error)}"
        advice = "allow reading, writing, listing and deleting there, or give another --out"
        yield Finding("out", State.FAIL, found, advice, ConfigError.exit_code)
        return
    if read != data or is_left:
        found = (
            f"{uri}: what was {'deleted is still there' if is_left else 'written reads otherwise'}"
        )
        advice = "give a store that shows what was written at once"
        yield Finding("out", State.FAIL, found, advice, ConfigError.exit_code)
    else:
        yield Finding("out", State.OK, f"{uri}: written, read and deleted")


def _require_answer(uri: str) -> None:
    # Asked first because the ordinary requests are repeated for minutes.
    address = store_address(uri)
    if address is not None:
        store_date(address)


def _missing_folders(uri: str) -> list[Path]:
    """Return the folders that a first file below a local output makes, the innermost first."""
    if not fs.is_local(uri):
        return []
    folder = fs.local_path(uri).absolute()
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split())[:300] or type(error).__name__


def store_address(uri: str) -> str | None:
    """Return the address of the server behind an `s3://` URI; None of others.

    The endpoint of the environment if there is one, as `fs` uses it.
    """
    if not uri.lower().startswith(("s3://", "s3a://")):
        return None
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    suffix = ".cn" if region and region.startswith("cn-") else ""
    return endpoint or f"https://s3.{f'{region}.' if region else ''}amazonaws.com{suffix}"


def store_date(address: str) -> float | None:
    """Ask a server for its time, in seconds since 1970; None if it does not say.

    Raises:
        InputError: if nobody answers there.
    """
    if urlsplit(address).scheme not in ("http", "https"):
        raise InputError(f"{address} is no http(s) address: correct AWS_ENDPOINT_URL")
    request = urllib.request.Request(address, method="HEAD")  # noqa: S310 - http(s), see above
    try:
        # The process's own proxy settings count, as for the jobs' requests.
        with urllib.request.urlopen(request, timeout=_HEAD_TIMEOUT_S) as reply:  # noqa: S310
            stated = reply.headers.get("Date")
    except urllib.error.HTTPError as error:  # "not allowed" has a date, too
        stated = error.headers.get("Date")
    except OSError as error:
        advice = "check AWS_ENDPOINT_URL, AWS_REGION and the network"
        raise InputError(f"nobody answers at {address}: {_reason(error)}; {advice}") from error
    return email.utils.parsedate_to_datetime(stated).timestamp() if stated else None


def check_clock(
    uris: list[str], *, ask: Callable[[str], float | None] = store_date
) -> Iterator[Finding]:
    """Compare this machine's clock with those of the stores, which refuse requests of another time.

    Raises:
        InputError: if nobody answers where a store should be.
    """
    addresses = dict.fromkeys(address for uri in uris if (address := store_address(uri)))
    for address in addresses:
        before = time.time()
        stated = ask(address)
        if stated is None:
            yield Finding("clock", State.SKIP, f"{address} does not tell its time")
            continue
        # The header has whole seconds.
        skew = max(0.0, abs((before + time.time()) / 2 - stated - 0.5) - 0.5)
        found, advice = f"{skew:.0f} s from that of {address}", "set the clock, for example by NTP"
        if skew > MAX_SKEW_S:
            yield Finding("clock", State.FAIL, found, advice, InputError.exit_code)
        elif skew > ADVISED_SKEW_S:
            yield Finding("clock", State.WARN, found, advice)
        else:
            yield Finding("clock", State.OK, found)
    if not addresses:
        yield Finding("clock", State.SKIP, "no store to compare it with")

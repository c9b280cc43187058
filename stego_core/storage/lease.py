"""One job at a time writes to an output: how a second one notices the first.

On a local file system the kernel's lock is held, and freed however the process ends. In an object
store an object says who writes and is renewed now and then; whoever finds it waits whether it
changes, which needs no clock that two machines share. S3 replaces it only if it is still the one
that was seen (conditional put); other stores can't, so there two that start within a moment of
each other may both go on.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final
from uuid import uuid4

from stego_core.errors import CheckpointError, ClusterError, InputError
from stego_core.storage import fs
from stego_core.storage.retry import retried
from stego_core.storage.uris import s3_client, split

logger = logging.getLogger(__name__)

_NAME: Final = "_owner.json"
BEAT_S: Final = 10.0
_PATIENCE_S: Final = 60.0
_SILENT_BEATS: Final = 4  # without a change, after which the owner is taken for dead


class Lease:
    """The right to write to an output, as long as `check` does not raise."""

    is_lost = False

    def check(self) -> None:
        """Raise ClusterError if another job has taken the output over."""
        if self.is_lost:
            raise ClusterError(
                "another job took this output over while this one could not reach the store: "
                "let the other one end"
            )


@contextmanager
def hold(uri: str, *, beat_s: float = BEAT_S) -> Iterator[Lease]:
    """Hold the lease of an output; nothing is left of it afterwards but a small file.

    Args:
        uri: the output.
        beat_s: seconds between signs of life in an object store.

    Raises:
        CheckpointError: if another job holds it.
        InputError: if its bucket is not there.
        PermissionError: if the store lets nobody write there.
    """
    if fs.is_local(uri):
        with _local(uri):
            yield Lease()
        return
    lease = _Remote(fs.join(uri, _NAME), beat_s)
    lease.acquire()
    stop = threading.Event()
    thread = threading.Thread(target=lease.beat, args=(stop,), daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        stop.set()
        thread.join()
        lease.release()


def _owner() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": round(time.time())}


def _busy(uri: str, owner: dict[str, Any]) -> CheckpointError:
    who = f"process {owner.get('pid')} on {owner.get('host')}"
    return CheckpointError(
        f"{uri}: another job ({who}) writes there: wait for it, end it, or give another --out"
    )


@contextmanager
def _local(uri: str) -> Iterator[None]:
    folder = fs.local_path(uri)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _NAME).open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = {}
            with suppress(ValueError):
                owner = json.loads(stream.read())
            raise _busy(uri, owner) from None
        except OSError as error:
            logger.warning("%s can't be locked (%s): start one job at a time on it", folder, error)
            yield
            return
        stream.truncate(0)
        stream.write(json.dumps(_owner()) + "\n")
        stream.flush()
        yield


class _Remote(Lease):
    def __init__(self, uri: str, beat_s: float) -> None:
        self.uri, self._beat_s = uri, beat_s
        self._record = _owner() | {"id": uuid4().hex, "beat": 0}

    def acquire(self) -> None:
        """Take the lease, after a dead owner's too."""
        found = fs.read_if_exists(self.uri)
        if found is None:
            if self._put_patiently(None):
                return
            found = fs.read_if_exists(self.uri) or b"{}"
        owner: dict[str, Any] = {}  # nothing is known of a record that is cut off or not ours
        with suppress(ValueError, TypeError):
            owner = dict(json.loads(found))
        for _ in range(_SILENT_BEATS):
            time.sleep(self._beat_s)
            latest = fs.read_if_exists(self.uri)
            if latest is None:  # its job has just ended
                found = None
                break
            if latest != found:
                raise _busy(self.uri.removesuffix(f"/{_NAME}"), owner)
        if not self._put_patiently(found):
            raise _busy(self.uri.removesuffix(f"/{_NAME}"), owner)

    def release(self) -> None:
        """Leave nothing of it; a successor's, or a store that is away, is left alone."""
        try:
            if self._is_ours(fs.read_if_exists(self.uri)):
                fs.delete(self.uri)
        except OSError as error:  # what the job has done counts
            logger.warning(
                "%s could not be deleted: the next job will wait for it (%s)", self.uri, error
            )

    def beat(self, stop: threading.Event) -> None:
        """Renew the lease until `stop`; a beat that does not reach the store is left out."""
        try:
            while not stop.wait(self._beat_s):
                self._record["beat"] += 1
                with suppress(OSError):
                    if not self._put(None, is_renewal=True):
                        self.is_lost = True
                        return
        except BaseException:
            self.is_lost = True  # nobody renews it any more: another job will take it
            raise

    def _body(self) -> bytes:
        return json.dumps(self._record).encode()

    def _put_patiently(self, replaces: bytes | None) -> bool:
        # The other stores' requests are repeated one by one already.
        if split(self.uri)[0] in ("s3", "s3a"):
            return retried(lambda: self._put(replaces), seconds=_PATIENCE_S)
        return self._put(replaces)

    def _put(self, replaces: bytes | None, *, is_renewal: bool = False) -> bool:
        """Write the record if the lease still is what it was, or ours; tell whether it was."""
        if split(self.uri)[0] in ("s3", "s3a"):
            return self._put_s3(replaces, is_new=replaces is None and not is_renewal)
        now = fs.read_if_exists(self.uri)
        if not self._is_ours(now) and (is_renewal or now != replaces):
            return False
        fs.write_bytes(self.uri, self._body())
        return True

    def _is_ours(self, body: bytes | None) -> bool:
        """Tell whether this lease wrote a record: which of its beats, a lost answer may hide."""
        with suppress(ValueError, AttributeError):
            return body is not None and json.loads(body).get("id") == self._record["id"]
        return False

    def _put_s3(self, replaces: bytes | None, *, is_new: bool) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, key = split(self.uri)[1].partition("/")
        client = s3_client()
        condition = {"IfNoneMatch": "*"}
        try:
            if not is_new:
                found = client.get_object(Bucket=bucket, Key=key)
                now = found["Body"].read()
                if not self._is_ours(now) and now != replaces:
                    return False
                condition = {"IfMatch": found["ETag"]}
            client.put_object(Bucket=bucket, Key=key, Body=self._body(), **condition)
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if error.response["Error"].get("Code") == "NoSuchBucket":
                raise InputError(
                    f"s3://{bucket}: no such bucket; make it, or check --out"
                ) from error
            if status == 403:
                raise PermissionError(f"{self.uri}: {error}") from error
            if status in (404, 409, 412):
                # Nobody's, or taken in this moment; the client may have repeated our own put.
                return self._is_ours(fs.read_if_exists(self.uri))
            if status == 501:  # a store without conditions
                fs.write_bytes(self.uri, self._body())
                return True
            raise OSError(str(error)) from error
        except BotoCoreError as error:
            raise OSError(str(error)) from error
        return True

"""Repeating what failed for the moment: throttling, errors of a server, lost connections."""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from stego_core.storage.uris import is_local

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

GIVE_UP_S: Final = 150.0
"""How long a fault may last: a store that is away for two minutes costs nothing but time."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 15.0
_DOUBT_S, _LOOKS = 5.0, 8
_LASTING_CLASSES: Final = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)
LASTING_ERRNO: Final = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EFBIG,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.ENOTDIR,
        errno.EEXIST,
    }
)
# What stores say that no repetition changes; pyarrow has no class of its own for them.
DENIED: Final = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_SIGNATURE",
    "INVALID_CLIENT_TOKEN_ID",
    "UNRECOGNIZED_CLIENT",
    "MISSING_AUTHENTICATION_TOKEN",
    "ExpiredToken",  # which pyarrow hands on as the store wrote it
    "PERMISSION_DENIED",  # of Google's storage, as the next
    "UNAUTHENTICATED",
    "OAuth2 access token",  # which Google's client could not get
)
# And of the content of an object that was still there when its size was asked for.
GONE: Final = ("NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "No such file or directory")
_LASTING_TEXT: Final = (*DENIED, *GONE, "NO_SUCH_BUCKET")


def is_passing(error: OSError) -> bool:
    """Tell whether the same request may succeed later.

    >>> is_passing(OSError("AWS Error SLOW_DOWN during PutObject operation"))
    True
    >>> is_passing(OSError("AWS Error ACCESS_DENIED during HeadObject operation"))
    False
    """
    return not (
        isinstance(error, _LASTING_CLASSES)
        or error.errno in LASTING_ERRNO
        or any(word in str(error) for word in _LASTING_TEXT)
    )


def retried(
    operation: Callable[[], _Result],
    *,
    seconds: float = GIVE_UP_S,
    sleep: Callable[[float], object] = time.sleep,
    is_passing: Callable[[OSError], bool] = is_passing,
) -> _Result:
    """Return what the operation returns; repeat it after errors that pass.

    Waits double, up to a quarter of a minute, and are drawn between half of that and all, so that
    many workers that were refused at once do not come back at once.

    Args:
        operation: can be repeated without harm.
        seconds: of waiting after which its error is raised.
        sleep: waits.
        is_passing: tells after which errors it is repeated.

    Raises:
        OSError: as the operation raised it.
    """
    waited_s, longest_s = 0.0, _FIRST_WAIT_S
    while True:
        try:
            return operation()
        except OSError as error:
            if waited_s >= seconds or not is_passing(error):
                raise
            logger.debug("tried again: %s", error)
            wait_s = random.uniform(longest_s / 2, longest_s)
            longest_s = min(2 * longest_s, _LONGEST_WAIT_S)
            waited_s += wait_s
            sleep(wait_s)


class _Doubts:
    """Refusals that are not believed at once: a store under load refuses what it has allowed.

    Looking again takes seconds, and a store may refuse millions of objects for good reasons: in a
    process each bucket has a few such looks in vain.
    """

    def __init__(self) -> None:
        self._left: dict[str, int] = {}

    def answered(self, uri: str) -> None:
        """Take note that the bucket of `uri` allowed something."""
        self._left.setdefault(_bucket(uri), _LOOKS)

    def has(self, uri: str) -> bool:
        """Tell whether a refusal deserves another look, and count it."""
        left = self._left.get(_bucket(uri), 0)
        if left:
            self._left[_bucket(uri)] = left - 1
        return left > 0

    def paid(self, uri: str) -> None:
        """Take note that a look was not in vain."""
        self._left[_bucket(uri)] += 1


_doubts = _Doubts()


def _bucket(uri: str) -> str:
    return "/".join(uri.split("/", 3)[:3])


def _asked(uri: str, operation: Callable[[], _Result]) -> _Result:
    try:
        result = retried(operation)
    except OSError as error:
        if not _is_denied(error) or not _doubts.has(uri):
            raise
        # Seconds, not minutes: mostly it is meant.
        result = retried(operation, seconds=_DOUBT_S, is_passing=_may_be_a_slip)
        _doubts.paid(uri)
    _doubts.answered(uri)
    return result


def _is_denied(error: OSError) -> bool:
    return any(word in str(error) for word in DENIED)


def _may_be_a_slip(error: OSError) -> bool:
    return is_passing(error) or _is_denied(error)


def repeated(uri: str, operation: Callable[[], _Result]) -> _Result:
    """Run an operation on `uri` that can be repeated; local ones fail for good.

    Raises:
        PermissionError: where the store says that it is not allowed.
        FileNotFoundError: where it says that the object is gone.
        OSError: any other, as `retried`.
    """
    try:
        return operation() if is_local(uri) else _asked(uri, operation)
    except OSError as error:
        if _is_denied(error):
            raise PermissionError(str(error)) from error
        if any(word in str(error) for word in GONE):
            raise FileNotFoundError(str(error)) from error
        raise

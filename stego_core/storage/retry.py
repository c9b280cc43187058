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
) -> _Result:
    """Return what the operation returns; repeat it after errors that pass.

    Waits double, up to a quarter of a minute, and are drawn between half of that and all, so that
    many workers that were refused at once do not come back at once.

    Args:
        operation: can be repeated without harm.
        seconds: of waiting after which its error is raised.
        sleep: waits.

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


def repeated(uri: str, operation: Callable[[], _Result]) -> _Result:
    """Run an operation on `uri` that can be repeated; local ones fail for good.

    Raises:
        PermissionError: where the store says that it is not allowed.
        FileNotFoundError: where it says that the object is gone.
        OSError: any other, as `retried`.
    """
    try:
        return operation() if is_local(uri) else retried(operation)
    except OSError as error:
        if any(word in str(error) for word in DENIED):
            raise PermissionError(str(error)) from error
        if any(word in str(error) for word in GONE):
            raise FileNotFoundError(str(error)) from error
        raise

"""The errors a user can meet, each with the exit code a job ends with.

A message says what happened, to which thing, and what to do about it, on one line. Problems of
single images are not errors: they are `ImageProblem` values that end up as rows of a table.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

EXIT_OK = 0
EXIT_BUG = 1


class StegoError(Exception):
    """Base of every error that is meant to be read by a user."""

    exit_code: ClassVar[int] = EXIT_BUG


class ConfigError(StegoError):
    """The configuration can't be used; holds one line for every problem found.

    Args:
        problems: one readable line each, all problems of the configuration at once.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class InputError(StegoError):
    """There is nothing to read: a wrong URI, an empty folder, a missing label folder."""

    exit_code = 3


class TooManyFailures(StegoError):
    """More images failed than the job's failure budget allows."""

    exit_code = 4


class ClusterError(StegoError):
    """Ray, or the resources it has, can't run the job."""

    exit_code = 5


class CheckpointError(ConfigError):
    """A checkpoint, weights file or earlier output can't be used with these settings."""


class SchemaError(StegoError):
    """A table does not have the columns or the version that it should have."""

    exit_code = 2


class ShapeError(StegoError, ValueError):
    """Tensors that belong together disagree in shape."""


class ImageProblem(StrEnum):
    """Why an image can't be used: the `status` of its row in the masks table.

    `OK` is the status of an image that was segmented.
    """

    OK = "ok"
    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    UNSUPPORTED_MODE = "unsupported_mode"
    TRUNCATED = "truncated"
    TOO_MANY_BYTES = "too_many_bytes"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_LONG_SIDE = "too_long_side"
    TOO_SMALL = "too_small"
    BAD_NAME = "bad_name"
    READ_DENIED = "read_denied"
    READ_FAILED = "read_failed"
    VANISHED = "vanished"
    CRASHED = "crashed"
    TIMED_OUT = "timed_out"

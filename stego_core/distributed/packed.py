"""One-row tables that carry a unit's table, or the error that it met, through a Ray Data plan."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from stego_core import errors
from stego_core.errors import StegoError
from stego_core.storage.retry import LASTING_ERRNO

logger = logging.getLogger(__name__)

_FAILURE = "failure"  # the column of a table that stands for an error


class UnitError(Exception):
    """A unit failed on its worker with an error that is none of ours."""


def to_bytes(table: pa.Table) -> bytes:
    """Return a table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    stream: bytes = sink.getvalue().to_pybytes()
    return stream


def pack(unit: int, table: pa.Table) -> pa.Table:
    """Return a one-row table that carries a unit's table."""
    payload = pa.array([to_bytes(table)], pa.large_binary())
    return pa.table({"unit": pa.array([unit], pa.int64()), "payload": payload})


def unpack(row: pa.Table) -> tuple[int, pa.Table]:
    """Return the unit and table of a one-row table that `pack` made."""
    with pa.ipc.open_stream(row["payload"][0].as_buffer()) as reader:
        return row["unit"][0].as_py(), reader.read_all()


def pack_result(unit: int, compute: Callable[[], pa.Table]) -> pa.Table:
    """Return the packed result, or the error as data.

    Ray Data raises an error of its own for one that leaves a stage, and on the way to the driver
    that loses what caused it: class, exit code and text.
    """
    try:
        return pack(unit, compute())
    except Exception as error:
        record = {
            "class": type(error).__name__,
            "text": str(error),
            "os": [error.errno, error.strerror, error.filename]
            if isinstance(error, OSError)
            else None,
            "traceback": traceback.format_exc(),
        }
        return pack(unit, pa.table({_FAILURE: [json.dumps(record)]}))


def is_failure(table: pa.Table) -> bool:
    """Tell whether a table stands for an error."""
    return _FAILURE in table.column_names


def raise_if_failed(table: pa.Table) -> None:
    """Raise the error that a table stands for.

    Raises:
        StegoError: one of ours, as a stage raised it.
        OSError: one that another attempt would not change, such as a full disk.
        UnitError: any other.
    """
    if not is_failure(table):
        return
    record = json.loads(table[_FAILURE][0].as_py())
    logger.debug("on a worker: %s", record["traceback"])
    kind = getattr(errors, record["class"], None)
    if isinstance(kind, type) and issubclass(kind, StegoError):
        raise kind(record["text"])
    if record["os"] and record["os"][0] in LASTING_ERRNO:
        raise OSError(*record["os"])  # a full disk: nothing that another attempt would change
    if record["class"] == PermissionError.__name__:  # of a store, without a number
        raise PermissionError(record["text"])
    raise UnitError(f"{record['class']}: {' '.join(record['text'].split())}")


class Worker:
    """The actor: builds the worker once, then gives it unit after unit."""

    def __init__(
        self, factory: Callable[..., Callable[..., pa.Table]], kwargs: dict[str, Any]
    ) -> None:
        self._problem: Exception | None = None
        try:
            self._work = factory(**kwargs)
        except Exception as error:
            self._problem = error  # told as the first unit's: here it would only kill the actor

    def __call__(self, row: pa.Table) -> pa.Table:
        """Return the packed result of a packed unit, or of an error the error."""
        unit, table = unpack(row)
        if is_failure(table):
            return row
        return pack_result(unit, lambda: self.run(unit, table))

    def run(self, unit: int, table: pa.Table) -> pa.Table:
        """Return the worker's result, or raise what kept it from being built."""
        if self._problem is not None:
            raise self._problem
        return self._work(unit, table)

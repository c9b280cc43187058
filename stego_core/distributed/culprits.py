"""Which pictures of a unit end or stop the process that computes with them: found by bisection."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from ray import cloudpickle

from stego_core.child import Answer, Child, ChildDied
from stego_core.distributed.packed import to_bytes
from stego_core.errors import ImageProblem, StegoError

Compute = Callable[[pa.Table], object]
Problem = tuple[str, str]  # status and detail

_TRIES = 2  # of a picture by itself: a death may have had another cause
# A try may take so many times what a black picture took, for each picture, and this at least: all
# tries of a unit with one that hangs stay far below the time after which Ray Data gives up.
_TIMES, _LEAST_S = 5, 10.0
# What stages take for a sign that a row has a picture (see `fetch_unit`), and what that has.
_PICTURE = ("pixels", "pixel_height", "pixel_width", "image_height", "image_width")
_CONTENT = ("pixels", "products", "norm_code")


class NotThePictures(Exception):
    """A stage fails at black pictures, too."""


class Search:
    """Looks for culprits in a child process.

    Args:
        start: called in each child, returns the computation. It must write nothing.
        seconds: that it may take for one picture.
        memory: → bytes that a child may take beyond what it starts with, or None.
    """

    def __init__(
        self, start: Callable[[], Compute], *, seconds: float, memory: Callable[[], int | None]
    ) -> None:
        self._seconds = seconds
        self._child = Child(lambda: _answers(start), memory=memory, dumps=cloudpickle.dumps)
        self._black_s: float | None = None

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def set_aside(self, table: pa.Table) -> pa.Table:
        """Return the table with the culprits' rows as those of pictures that can't be used.

        After a black picture, which tells how long one takes, the whole unit is tried, and most
        often that is all: its process died of something else. Then halves are, and halves of those
        that fail: at most 2n + 2 tries of n pictures, and a second one of each culprit.

        Raises:
            NotThePictures: if a black picture of two pictures' sizes fails, too.
            ClusterError: if the child does not start.
        """
        usable = [r for r, s in enumerate(table["status"].to_pylist()) if s == ImageProblem.OK]
        if not usable:
            return table
        if "pixels" in table.column_names:
            self._try_black(table, usable)
        if not self._try(table, usable, self._limit_s(len(usable))):
            return table
        return set_aside(table, dict(self._culprits(table, usable)))

    def _try_black(self, table: pa.Table, usable: Sequence[int]) -> None:
        problem = None
        for row in dict.fromkeys((usable[0], usable[-1])):
            self._child.ready()  # how long a model takes to load says nothing of a picture
            start = time.monotonic()
            problem = self._try(_blackened(table, row), [row], self._seconds)
            if problem is None:
                self._black_s = time.monotonic() - start
                return
        raise NotThePictures(f"a black picture fails, too: {problem[1] if problem else ''}")

    def _limit_s(self, pictures: int) -> float:
        if self._black_s is None:
            return min(self._seconds * pictures, 6 * _LEAST_S)
        return limit_s(pictures, seconds=self._seconds, black_s=self._black_s)

    def _culprits(self, table: pa.Table, rows: Sequence[int]) -> list[tuple[int, Problem]]:
        """Return the culprits among rows which, together, fail."""
        if len(rows) == 1:
            # The last word has all the time that a picture may take.
            limits_s = [self._limit_s(1)] * (_TRIES - 1) + [self._seconds]
            problem = None
            for limit in limits_s:
                problem = self._try(table, rows, limit)
                if problem is None:
                    return []
            return [(rows[0], problem)] if problem else []
        middle = len(rows) // 2
        found = []
        for half in (rows[:middle], rows[middle:]):
            if len(half) == 1 or self._try(table, half, self._limit_s(len(half))):
                found += self._culprits(table, half)
        return found

    def _try(self, table: pa.Table, rows: Sequence[int], seconds: float) -> Problem | None:
        """Compute with the pictures of these rows alone; return what becomes of it."""
        others = set(range(table.num_rows)).difference(rows)
        part = set_aside(table, dict.fromkeys(others, (ImageProblem.CRASHED.value, "")))
        try:
            text = self._child(to_bytes(part), seconds=seconds).decode()
        except ChildDied as died:
            if died.is_late:
                return ImageProblem.TIMED_OUT.value, f"computing took more than {seconds:g} s"
            return ImageProblem.CRASHED.value, f"the process that computed with it ended: {died}"
        return (ImageProblem.CRASHED.value, text) if text else None


def limit_s(pictures: int, *, seconds: float, black_s: float) -> float:
    """Return how long a try may take.

    Args:
        pictures: of the try.
        seconds: that one may take at most.
        black_s: what a black one took, by itself.
    """
    return min(seconds * pictures, max(_LEAST_S, _TIMES * black_s * pictures))


def set_aside(table: pa.Table, problems: dict[int, Problem]) -> pa.Table:
    """Return the table of a unit with the pictures of some rows taken out.

    Args:
        table: as `fetch_unit` makes it, perhaps with more columns.
        problems: row → status and detail.
    """
    if not problems:
        return table
    is_aside = pa.array([row in problems for row in range(table.num_rows)])
    texts = [problems.get(row, (None, None)) for row in range(table.num_rows)]
    new = {
        "status": pa.array([status for status, _ in texts], pa.string()),
        "detail": pa.array([detail for _, detail in texts], pa.string()),
    } | {name: pa.scalar(None, table.schema.field(name).type) for name in _pictures(table)}
    for name, values in new.items():
        column = pc.if_else(is_aside, values, table[name])
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _pictures(table: pa.Table) -> list[str]:
    return [name for name in _PICTURE if name in table.column_names]


def _blackened(table: pa.Table, row: int) -> pa.Table:
    """Return the table with a black picture for that of one row, and nothing else that it has."""
    for name in (*_CONTENT, "label"):
        if name in table.column_names:
            cells: list[Any] = [None] * table.num_rows
            if name in _CONTENT and table[name][row].is_valid:
                cells[row] = bytes(len(table[name][row].as_buffer()))
            column = pa.array(cells, table.schema.field(name).type)
            table = table.set_column(table.column_names.index(name), name, column)
    return table


def _answers(start: Callable[[], Compute]) -> Answer:
    """Return the computation with an Arrow stream for its table; it answers with what it met."""
    compute = start()

    def answer(request: bytes) -> bytes:
        with pa.ipc.open_stream(request) as reader:
            table = reader.read_all()
        try:
            compute(table)
        except StegoError:
            pass  # no picture's fault: the stage itself will say it
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200].encode()
        return b""

    return answer

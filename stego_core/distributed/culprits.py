"""Which pictures of a unit end or stop the process that computes with them: found by bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stego_core.distributed.child import Answer, Child, ChildDied
from stego_core.errors import ImageProblem, StegoError

Compute = Callable[[pa.Table], object]
Problem = tuple[str, str]  # status and detail

_TRIES = 2  # of a picture by itself: a death may have had another cause
# What stages take for a sign that a row has a picture (see `fetch_unit`).
_PICTURE = ("pixels", "pixel_height", "pixel_width")


class NotThePictures(Exception):
    """A stage fails at a black picture, too."""


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
        self._seconds, self._child = seconds, Child(lambda: _answers(start), memory=memory)

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def set_aside(self, table: pa.Table) -> pa.Table:
        """Return the table with the culprits' rows as those of pictures that can't be used.

        The whole unit is tried first, and most often that is all: its process died of something
        else. Then halves are, and halves of those that fail: at most 2n + 1 tries of n pictures,
        and a second one of each culprit.

        Raises:
            NotThePictures: if a black picture of the first one's size fails, too.
        """
        usable = [r for r, s in enumerate(table["status"].to_pylist()) if s == ImageProblem.OK]
        if not usable or not self._try(table, usable):
            return table
        if "pixels" in table.column_names:
            black = _blackened(table, usable[0])
            if problem := self._try(black, usable[:1]):
                raise NotThePictures(f"a black picture fails, too: {problem[1]}")
        return set_aside(table, dict(self._culprits(table, usable)))

    def _culprits(self, table: pa.Table, rows: Sequence[int]) -> list[tuple[int, Problem]]:
        """Return the culprits among rows which, together, fail."""
        if len(rows) == 1:
            problem = None
            for _ in range(_TRIES):
                problem = self._try(table, rows)
                if problem is None:
                    return []
            return [(rows[0], problem)] if problem else []
        middle = len(rows) // 2
        found = []
        for half in (rows[:middle], rows[middle:]):
            if len(half) == 1 or self._try(table, half):
                found += self._culprits(table, half)
        return found

    def _try(self, table: pa.Table, rows: Sequence[int]) -> Problem | None:
        """Compute with the pictures of these rows alone; return what becomes of it."""
        others = set(range(table.num_rows)).difference(rows)
        part = set_aside(table, dict.fromkeys(others, (ImageProblem.CRASHED.value, "")))
        seconds = self._seconds * len(rows)
        try:
            text = self._child(_to_bytes(part), seconds=seconds).decode()
        except ChildDied as died:
            if died.is_late:
                return ImageProblem.TIMED_OUT.value, f"computing took more than {seconds:g} s"
            return ImageProblem.CRASHED.value, f"the process that computed with it ended: {died}"
        return (ImageProblem.CRASHED.value, text) if text else None


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
    cells: list[Any] = [None] * table.num_rows
    cells[row] = bytes(len(table["pixels"][row].as_buffer()))
    index = table.column_names.index("pixels")
    return table.set_column(index, "pixels", pa.array(cells, pa.large_binary()))


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


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

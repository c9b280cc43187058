"""Many listed files in little memory: Arrow columns, read as a sequence of `ListedFile`.

What is longer than one chunk lies in a temporary file without a name, mapped into memory: the
kernel keeps of it what fits, and ten million names take no memory that others need.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import overload

import pyarrow as pa

from stego_core.storage.fs import ListedFile

_CHUNK = 65_536
_SCHEMA = pa.schema(
    [
        ("image_uri", pa.string()),
        ("path", pa.string()),
        ("image_bytes", pa.int64()),
        ("image_etag", pa.string()),
    ]
)


class Listing(Sequence[ListedFile]):
    """Files in the order they came.

    Args:
        files: of a listing; taken one by one.

    Attributes:
        table: `image_uri`, `path`, `image_bytes`, `image_etag`.
    """

    def __init__(self, files: Iterable[ListedFile]) -> None:
        batches = _batches(files)
        first = list(islice(batches, 2))
        if len(first) < 2:
            self.table = pa.Table.from_batches(first, _SCHEMA)
        else:
            self.table = _mapped(chain(first, batches))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[ListedFile]:
        for batch in self.table.to_batches(max_chunksize=4096):
            columns = [column.to_pylist() for column in batch.columns]
            yield from map(ListedFile, *columns)

    @overload
    def __getitem__(self, index: int) -> ListedFile: ...

    @overload
    def __getitem__(self, index: slice) -> list[ListedFile]: ...

    def __getitem__(self, index: int | slice) -> ListedFile | list[ListedFile]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return ListedFile(*(column[number].as_py() for column in self.table.columns))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def _batches(files: Iterable[ListedFile]) -> Iterator[pa.RecordBatch]:
    stream = iter(files)
    while part := list(islice(stream, _CHUNK)):
        columns = zip(*((f.uri, f.path, f.num_bytes, f.etag) for f in part), strict=True)
        arrays = [
            pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)
        ]
        yield pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def _mapped(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """Write batches to a file and map it; its name goes at once, the file with the table."""
    with tempfile.NamedTemporaryFile(prefix="stego-listing-") as file:
        with pa.ipc.new_file(file, _SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
        file.flush()
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all()

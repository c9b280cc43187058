"""Many listed files in little memory: Arrow columns, read as a sequence of `ListedFile`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
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
    """Files in the order they came: about 150 bytes each where objects take 400.

    Args:
        files: of a listing; taken one by one.

    Attributes:
        table: `image_uri`, `path`, `image_bytes`, `image_etag`.
    """

    def __init__(self, files: Iterable[ListedFile]) -> None:
        stream = iter(files)
        chunks = []
        while part := list(islice(stream, _CHUNK)):
            columns = zip(*((f.uri, f.path, f.num_bytes, f.etag) for f in part), strict=True)
            chunks.append(
                pa.RecordBatch.from_arrays(
                    [
                        pa.array(values, field.type)
                        for values, field in zip(columns, _SCHEMA, strict=True)
                    ],
                    schema=_SCHEMA,
                )
            )
        self.table = pa.Table.from_batches(chunks, _SCHEMA)

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

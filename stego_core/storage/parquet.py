"""Parquet: tables as bytes, and those of strangers with plain columns only.

An Arrow extension type is looked up by the name in a column's metadata, and the code that is found
there reads more of the metadata. Ray registers such types in every worker, and some of them were
pickles (CVE-2026-41486). No table of ours has any, so a table that names one is refused before
Arrow makes a type of it: by its footer, because to open a file is to make its types.
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stego_core.errors import SchemaError

_KEY, _MARK = b"ARROW:schema", b"ARROW:extension:"
_MAGIC = b"PAR1"
_TAIL_BYTES = 8  # length of the footer, and the magic
_VALUE_FOLLOWS = 0x18  # Thrift's compact protocol: the next field, of bytes


def table_bytes(table: pa.Table, **options: Any) -> bytes:
    """Return a table as the bytes of a Parquet file, compressed with zstd unless told otherwise.

    Args:
        table: small enough for memory twice.
        options: of `pq.write_table`.
    """
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **{"compression": "zstd"} | options)
    return buffer.getvalue()


def refuse_extensions(source: Any, filesystem: Any = None, *, name: str = "a table") -> None:
    """Check that a Parquet file names no Arrow extension type; one that is no Parquet passes.

    Args:
        source: a path of `filesystem`, or, without one, an open file of Arrow.
        filesystem: as `fs.open_uri` gives it.
        name: of the file, for the error.

    Raises:
        SchemaError: if it does, or describes its columns in a way that can't be followed.
    """
    if filesystem is None:
        footer = _footer(source)
    else:
        with filesystem.open_input_file(source) as stream:
            footer = _footer(stream)
    place = footer.find(_KEY)
    while place >= 0:
        place += len(_KEY)
        if _MARK in _value_after(footer, place, name):
            raise SchemaError(f"{name} has columns of extension types; only plain columns are read")
        place = footer.find(_KEY, place)


def plain_table(data: bytes, *, name: str = "a table") -> pa.Table:
    """Return the table of a Parquet file of plain columns.

    Raises:
        SchemaError: if it names an extension type.
        pa.ArrowInvalid: if it is no Parquet.
    """
    refuse_extensions(pa.BufferReader(data), name=name)
    return pq.read_table(pa.BufferReader(data))


def plain_rows(uri: str) -> list[dict[str, Any]]:
    """Return the rows of a small table; none if there is no such file.

    Raises:
        SchemaError: if it is no Parquet, or names an extension type.
    """
    from stego_core.storage import fs  # which imports this module: whichever comes first must load

    data = fs.read_if_exists(uri)
    try:
        return [] if data is None else plain_table(data, name=uri).to_pylist()
    except pa.ArrowInvalid as error:
        raise SchemaError(f"{uri} is no Parquet: {str(error).splitlines()[0]}") from error


def _footer(stream: Any) -> bytes:
    size = stream.size()
    if size < _TAIL_BYTES:
        return b""
    tail = stream.read_at(_TAIL_BYTES, size - _TAIL_BYTES)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length > size - _TAIL_BYTES:
        return b""  # no Parquet, as Arrow will say
    footer: bytes = stream.read_at(length, size - _TAIL_BYTES - length)
    return footer


def _value_after(footer: bytes, place: int, name: str) -> bytes:
    """Return what stands behind the key: a tag, a varint for the length, and base64."""
    try:
        if footer[place] != _VALUE_FOLLOWS:
            raise ValueError("another order of fields")
        length, start = 0, place + 1
        for shift in (0, 7, 14, 21, 28):
            byte = footer[start]
            length |= (byte & 0x7F) << shift
            start += 1
            if byte < 0x80:
                break
        return base64.b64decode(footer[start : start + length], validate=True)
    except (ValueError, IndexError, binascii.Error) as error:
        raise SchemaError(f"{name}: its description of columns is damaged") from error

"""Small tables as rows, for what is shown of them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from stego_core.errors import SchemaError
from stego_core.storage import fs
from stego_core.storage.parquet import plain_table


def plain_rows(uri: str) -> list[dict[str, Any]]:
    """Return the rows of a small table; none if there is no such file.

    Raises:
        SchemaError: if it is no Parquet, or names an extension type.
    """
    data = fs.read_if_exists(uri)
    try:
        return [] if data is None else plain_table(data, name=uri).to_pylist()
    except pa.ArrowInvalid as error:
        raise SchemaError(f"{uri} is no Parquet: {str(error).splitlines()[0]}") from error

"""Is an output whole? Ids against the manifest, without Ray.

`python -m stego_core.masks.verify OUT` prints one line; the exit code is 0 if it is.

Only ids and statuses are read, one file at a time; 10^7 images take about 160 MB.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stego_core.errors import SchemaError, StegoError
from stego_core.storage import fs
from stego_core.storage.manifest import read_manifest

SUCCESS = "_SUCCESS"
_PART = re.compile(r"part-(\d{5,})\.parquet")


@dataclass(frozen=True, slots=True)
class Verified:
    """What an output holds, compared with its manifest.

    Attributes:
        expected: images of the manifest.
        rows: rows of the masks.
        lost: images without a row.
        duplicated: rows beyond the first of an image.
        foreign: rows of images that the manifest does not have.
        is_ordered: whether the rows are those of the manifest, once each, in its order.
        ids_sha256: of the manifest's ids, as int64.
        statuses: rows of each status.
        fingerprint: of the settings and the model that made the masks; empty without a file.
    """

    expected: int
    rows: int
    lost: int
    duplicated: int
    foreign: int
    is_ordered: bool
    ids_sha256: str
    statuses: dict[str, int]
    fingerprint: str

    def record(self) -> dict[str, Any]:
        """Return what `_SUCCESS` holds."""
        names = ("rows", "statuses", "ids_sha256", "fingerprint")
        return {name: getattr(self, name) for name in names}


def part_name(part: int) -> str:
    """Return the name of a shard's file."""
    return f"part-{part:05d}.parquet"


def part_number(name: str) -> int | None:
    """Return the number of a shard's file; None for a file that no job has made.

    >>> part_number("part-00003.parquet"), part_number("part-00003.parquet.bak")
    (3, None)
    """
    found = _PART.fullmatch(name)
    return None if found is None else int(found[1])


def mask_files(uri: str) -> list[str]:
    """Return the URIs of an output's Parquet files, in the order of their numbers."""
    names = fs.list_names(fs.join(uri, "masks"))
    parts = sorted(part for name in names if (part := part_number(name)) is not None)
    return [fs.join(uri, "masks", part_name(part)) for part in parts]


def mask_columns(uri: str, columns: list[str]) -> Iterator[pa.Table]:
    """Yield the named columns of an output (none named: all), one table a file."""
    for file in mask_files(uri):
        yield fs.read_table(file, columns or None)


def verify_output(uri: str) -> Verified:
    """Compare the rows of a segmentation's output with its manifest.

    Args:
        uri: what `--out` of the job was.

    Raises:
        SchemaError: if the manifest is another kind of file, or the masks are of several runs.
        FileNotFoundError: if there is no manifest.
    """
    manifest = read_manifest(fs.join(uri, "manifest.parquet"))
    expected = manifest.read(["image_id"])["image_id"].to_numpy()
    ids: list[np.ndarray] = [np.zeros(0, np.int64)]
    statuses: Counter[str] = Counter()
    for table in mask_columns(uri, ["image_id", "status"]):
        ids.append(table["image_id"].to_numpy())
        for entry in pc.value_counts(table["status"]).to_pylist():
            statuses[entry["values"]] += entry["counts"]
    found = np.concatenate(ids)
    distinct = np.unique(found)
    return Verified(
        expected=len(expected),
        rows=len(found),
        lost=len(np.setdiff1d(expected, distinct)),
        duplicated=len(found) - len(distinct),
        foreign=len(np.setdiff1d(distinct, expected)),
        is_ordered=np.array_equal(found, expected),
        ids_sha256=hashlib.sha256(expected.tobytes()).hexdigest(),
        statuses=dict(statuses),
        fingerprint=_fingerprint(uri),
    )


def _fingerprint(uri: str) -> str:
    footers = map(fs.read_footer, mask_files(uri))
    told = {(footer.metadata or {}).get(b"stego.fingerprint", b"") for footer in footers}
    if len(told) > 1:
        raise SchemaError(f"{uri}/masks holds files of several runs: give another --out")
    return told.pop().decode() if told else ""


def row_digests(uri: str) -> dict[int, bytes]:
    """Return a hash of every row, mask included, by image id; for outputs of a test's size."""
    rows = (row for table in mask_columns(uri, []) for row in table.to_pylist())
    return {row["image_id"]: hashlib.sha256(repr(row).encode()).digest() for row in rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line about an output; return 0 if every image has one row and `_SUCCESS` agrees."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m stego_core.masks.verify OUT\n")
        return 2
    (uri,) = arguments
    try:
        found = verify_output(uri)
        record = json.loads(fs.read_if_exists(fs.join(uri, SUCCESS)) or b"null")
    except (StegoError, OSError, ValueError) as error:
        sys.stderr.write(f"{uri}: {' '.join(str(error).split())}\n")
        return 2
    now = found.record()
    # An output of an earlier version says no fingerprint.
    is_told = record in (now, {name: now[name] for name in now if name != "fingerprint"})
    state = "agrees" if is_told else ("is not there" if record is None else "does not agree")
    sys.stdout.write(
        f"{uri}: {found.expected} images, {found.rows} rows, {found.lost} lost, "
        f"{found.duplicated} duplicated, {found.foreign} foreign; {SUCCESS} {state}\n"
    )
    return 0 if found.is_ordered and is_told else 1


if __name__ == "__main__":
    sys.exit(main())

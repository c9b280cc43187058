"""An output whose input has grown: which images are new, and the manifest that holds them too.

Images that are gone keep their rows and are reported. A changed image loses its row and is new.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stego_core.storage import fs
from stego_core.storage.manifest import (
    Manifest,
    equal_units,
    manifest_bytes,
    read_manifest,
)

SHARDS = b"stego.shards"


@dataclass(frozen=True, slots=True)
class Shard:
    """Units whose rows are one file for users.

    Attributes:
        part: number of the file.
        first: its first unit.
        sizes: images of its units.
    """

    part: int
    first: int
    sizes: tuple[int, ...]

    @property
    def units(self) -> range:
        """Return its units."""
        return range(self.first, self.first + len(self.sizes))


def read_shards(manifest_uri: str, *, per_shard: int) -> list[Shard]:
    """Return the shards of a manifest, in its order.

    Args:
        manifest_uri: of the Parquet file.
        per_shard: units of one shard, where the manifest does not say it itself.
    """
    footer = fs.read_footer(manifest_uri)
    sizes = read_manifest(manifest_uri).sizes()
    told = (footer.metadata or {}).get(SHARDS)
    counts = [(n, per_shard) for n in range(-(-len(sizes) // per_shard))]
    if told is not None:
        counts = [(part, units) for part, units in json.loads(told)]
    shards, first = [], 0
    for part, units in counts:
        shards.append(Shard(part, first, tuple(sizes[first : first + units])))
        first += units
    return shards


@dataclass(frozen=True, slots=True)
class Changes:
    """What a listing has that a manifest has not, and the other way round.

    Attributes:
        fresh: rows of the listing that are new or changed, in its order.
        changed: ids of those that the manifest has with another etag or size, or that are to be
            done again.
        gone: rows of the manifest that the listing does not have.
    """

    fresh: pa.Table
    changed: np.ndarray
    gone: pa.Table

    def counts(self) -> dict[str, int]:
        """Return how many images are added, changed and gone."""
        return {
            "added": self.fresh.num_rows - len(self.changed),
            "changed": len(self.changed),
            "gone": self.gone.num_rows,
        }


def compare(manifest: pa.Table, listing: pa.Table, *, again: np.ndarray | None = None) -> Changes:
    """Compare two tables of the manifest's columns by id, size and etag.

    Args:
        manifest: what is done.
        listing: what there is now.
        again: ids that count as changed if the listing still has them; int64.
    """
    old, new = (table["image_id"].to_numpy() for table in (manifest, listing))
    order = np.argsort(old)
    place = np.minimum(np.searchsorted(old, new, sorter=order), len(old) - 1)
    match = order[place]
    is_known = old[match] == new
    is_same = is_known.copy()
    for name in ("image_bytes", "image_etag"):
        is_equal = pc.equal(manifest[name].take(match), listing[name]).to_numpy()
        is_same &= is_equal
    if again is not None:
        is_same &= np.isin(new, again, invert=True)
    is_gone = np.isin(old, new, invert=True)
    return Changes(
        fresh=listing.filter(pa.array(~is_same)),
        changed=new[is_known & ~is_same],
        gone=manifest.filter(pa.array(is_gone)),
    )


def extended(
    manifest: pa.Table,
    shards: list[Shard],
    changes: Changes,
    *,
    digest: str,
    unit_images: int,
    per_shard: int,
) -> bytes:
    """Return the new manifest's file: what was there without what changed, then the fresh rows.

    What was there is one unit for each of its shards, so that files keep their numbers.

    Args:
        manifest: all rows of the present one.
        shards: of the present one.
        changes: what `compare` returned.
        digest: of the listing.
        unit_images: images of a new unit.
        per_shard: units of a new shard.
    """
    kept_rows: list[pa.Table] = []
    runs: list[tuple[int, int]] = []
    told: list[list[int]] = []
    is_kept = np.isin(manifest["image_id"].to_numpy(), changes.changed, invert=True)
    start = 0
    for shard in shards:
        rows = sum(shard.sizes)
        kept = manifest.slice(start, rows).filter(pa.array(is_kept[start : start + rows]))
        start += rows
        if kept.num_rows:
            kept_rows.append(kept)
            runs.append((1, kept.num_rows))
            told.append([shard.part, 1])
    new = equal_units(changes.fresh.num_rows, unit_images)
    num_new = sum(units for units, _ in new)
    part = max((shard.part for shard in shards), default=-1) + 1  # no number is used again
    for number, at in enumerate(range(0, num_new, per_shard)):
        told.append([part + number, min(per_shard, num_new - at)])
    table = pa.concat_tables([t.replace_schema_metadata() for t in (*kept_rows, changes.fresh)])
    grown = Manifest("", (*runs, *new), digest)
    return manifest_bytes(grown, table, **{SHARDS.decode(): json.dumps(told)})

"""The files of a segmentation: which units are done, their merging, and taking up new images.

A unit's file is the unit of loss; a shard's file, `masks/part-<n>.parquet`, holds many units in
manifest order and is written in one piece. A unit is done if either is there.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from stego_core.config.load import fingerprint
from stego_core.config.schema import PredictConfig
from stego_core.distributed.segment_finish import unit_uri
from stego_core.masks.table import may_pass, to_parquet
from stego_core.masks.verify import SUCCESS, mask_columns, part_name, part_number
from stego_core.storage import fs
from stego_core.storage.extend import Shard, compare, extended, read_shards
from stego_core.storage.manifest import digest_files, image_id, manifest_table, read_manifest
from stego_core.storage.parquet import plain_table, table_bytes
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)

_REQUESTS = 16  # at a time: results wait while the driver merges
NEXT = "manifest.next.parquet"
"""The manifest of an extension that is not carried out yet."""


class Shards:
    """Which units are done, and the merging of their files into the files that users see.

    Args:
        out: of the job.
        manifest_uri: its manifest.
        per_shard: units of a shard.
        metadata: of the files.

    Attributes:
        folder: of the units' files. It belongs to one manifest and one set of settings: a process
            of an earlier one, which nobody could end, may still write.
    """

    def __init__(
        self, out: str, manifest_uri: str, *, per_shard: int, metadata: dict[str, str]
    ) -> None:
        self._out, self._metadata = out, metadata
        self._shards = read_shards(manifest_uri, per_shard=per_shard)
        self._shard_of = {unit: shard for shard in self._shards for unit in shard.units}
        ids = fs.read_table(manifest_uri, ["image_id"])["image_id"].to_numpy()
        name = fingerprint(metadata, hashlib.sha256(ids.tobytes()).hexdigest())
        self.folder = fs.join(out, "_units", name)
        for other in fs.list_names(fs.join(out, "_units")):
            if other != name:
                fs.delete(fs.join(out, "_units", other))
        parts = map(part_number, fs.list_names(fs.join(out, "masks")))
        self._merged = {part for part in parts if part is not None}
        units = fs.list_names(self.folder)
        self._done = {int(u[5:13]) for u in units if u.endswith(".parquet")}
        for shard in self._shards:
            # A run may have died between writing a part and deleting its units, or before merging.
            if self._done.intersection(shard.units) and not self._is_whole(shard):
                self._merged.discard(shard.part)
            self._merge_if_complete(shard.first)

    def pending(self) -> list[int]:
        """Return the units that are not done."""
        return [
            unit
            for shard in self._shards
            if shard.part not in self._merged
            for unit in shard.units
            if unit not in self._done
        ]

    def num_images(self, unit: int) -> int:
        """Return the images of a unit."""
        shard = self._shard_of[unit]
        return shard.sizes[unit - shard.first]

    def unit_done(self, unit: int) -> None:
        """Take note of a unit's file; merge its shard if it was the last."""
        self._done.add(unit)
        self._merge_if_complete(unit)

    def _merge_if_complete(self, unit: int) -> None:
        shard = self._shard_of[unit]
        if shard.part not in self._merged:
            if not self._done.issuperset(shard.units):
                return
            with ThreadPoolExecutor(_REQUESTS) as pool:  # a store answers each in its own time
                tables = list(pool.map(self._rows, shard.units))
            whole = [table for table in tables if table is not None]
            if len(whole) < len(tables):
                return
            data = to_parquet(pa.concat_tables(whole), self._metadata)
            fs.write_bytes(self._part_uri(shard), data)
            self._merged.add(shard.part)
        leftovers = [unit_uri(self.folder, unit) for unit in self._done.intersection(shard.units)]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            list(pool.map(fs.delete, leftovers))

    def _part_uri(self, shard: Shard) -> str:
        return fs.join(self._out, "masks", part_name(shard.part))

    def _is_whole(self, shard: Shard) -> bool:
        """Tell whether a part has its rows: not every store writes a file in one piece."""
        try:
            return bool(fs.read_footer(self._part_uri(shard)).num_rows == sum(shard.sizes))
        except (FileNotFoundError, pa.ArrowInvalid):
            return False

    def _rows(self, unit: int) -> pa.Table | None:
        """Return a unit's rows; of a file that was cut off none, and the unit is pending again."""
        uri = unit_uri(self.folder, unit)
        try:
            return plain_table(fs.read_bytes(uri), name=uri)  # whole: it takes the fewest requests
        except pa.ArrowInvalid:
            fs.delete(uri)
            self._done.discard(unit)
            return None


def unread_images(out: str, files: Iterable[fs.ListedFile]) -> np.ndarray:
    """Return the ids of listed images that failed for a reason that may pass; int64."""
    tables = mask_columns(out, ["image_id", "status", "detail"])
    failed = (table.filter(may_pass(table)) for table in tables)
    found = np.concatenate([np.zeros(0, np.int64), *(t["image_id"].to_numpy() for t in failed)])
    if not len(found):
        return found
    return np.intersect1d(found, [image_id(file.path) for file in files])


def extend(
    run: RunDirectory,
    files: Sequence[fs.ListedFile],
    *,
    predict: PredictConfig,
    again: np.ndarray,
) -> None:
    """Take up what has changed in the input since the manifest of a complete output was written.

    New and changed images become new units. Images that are gone keep their rows and are listed in
    `gone.parquet`.

    Args:
        run: of the output.
        files: the input as it is now.
        predict: sizes of units and shards.
        again: ids of images that lose their rows and are done again; int64.
    """
    uri = run.path("manifest.parquet")
    manifest = read_manifest(uri).read()
    changes = compare(manifest, manifest_table(files), again=again)
    counts = changes.counts()
    if len(again):
        logger.info("%d images that could not be read are tried again", len(again))
    logger.info("taking up: %(added)d images added, %(changed)d changed, %(gone)d gone", counts)
    run.event("segment/changed", **counts)
    gone = changes.gone.replace_schema_metadata({})
    fs.write_bytes(run.path("gone.parquet"), table_bytes(gone))
    shards = read_shards(uri, per_shard=predict.shard_batches)
    data = extended(
        manifest,
        shards,
        changes,
        digest=digest_files(files),
        unit_images=predict.unit_images,
        per_shard=predict.shard_batches,
    )
    fs.delete(run.path(SUCCESS))
    fs.write_bytes(run.path(NEXT), data)
    finish_extension(run)


def finish_extension(run: RunDirectory) -> None:
    """Carry out an extension whose manifest is written; doing it twice does no harm."""
    uri = run.path(NEXT)
    data = fs.read_if_exists(uri)
    if data is None:
        return
    manifest = read_manifest(uri)
    shards = {part_name(shard.part): shard for shard in read_shards(uri, per_shard=1)}
    for name in fs.list_names(run.path("masks")):
        if part_number(name) is None:
            continue
        if name not in shards:
            fs.delete(run.path("masks", name))
            continue
        kept = manifest.read_unit(shards[name].first)["image_id"].to_numpy()
        _keep_rows(run.path("masks", name), kept)
    fs.write_bytes(run.path("manifest.parquet"), data)
    fs.delete(uri)


def _keep_rows(part_uri: str, ids: np.ndarray) -> None:
    """Drop the rows of a part that are not of these images."""
    is_kept = np.isin(fs.read_table(part_uri, ["image_id"])["image_id"].to_numpy(), ids)
    if is_kept.all():
        return
    table = fs.read_table(part_uri)
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    fs.write_bytes(part_uri, to_parquet(table.filter(pa.array(is_kept)), metadata))

"""The files of a segmentation: which units are done, their merging, and taking up new images.

A unit's file is the unit of loss; a shard's file, `masks/part-<n>.parquet`, holds many units in
manifest order and is written in one piece. A unit is done if either is there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stego_core.config.schema import PredictConfig
from stego_core.distributed.segment_finish import unit_uri
from stego_core.errors import ImageProblem
from stego_core.masks.table import to_parquet
from stego_core.masks.verify import SUCCESS, mask_columns
from stego_core.storage import fs
from stego_core.storage.extend import compare, extended, read_shards
from stego_core.storage.manifest import digest_files, image_id, manifest_table, read_manifest
from stego_core.storage.parquet import table_bytes
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)

_UNREAD = pa.array([ImageProblem.VANISHED, ImageProblem.READ_DENIED, ImageProblem.READ_FAILED])

NEXT = "manifest.next.parquet"
"""The manifest of an extension that is not carried out yet."""


def part_name(part: int) -> str:
    """Return the name of a shard's file."""
    return f"part-{part:05d}.parquet"


class Shards:
    """Which units are done, and the merging of their files into the files that users see.

    Args:
        out: of the job.
        manifest_uri: its manifest.
        per_shard: units of a shard.
        metadata: of the files.
    """

    def __init__(
        self, out: str, manifest_uri: str, *, per_shard: int, metadata: dict[str, str]
    ) -> None:
        self._out, self._metadata = out, metadata
        self._shards = read_shards(manifest_uri, per_shard=per_shard)
        self._shard_of = {unit: shard for shard in self._shards for unit in shard.units}
        parts = fs.list_names(fs.join(out, "masks"))
        self._merged = {int(p[5:].split(".")[0]) for p in parts if p.startswith("part-")}
        units = fs.list_names(fs.join(out, "_units"))
        self._done = {int(u[5:13]) for u in units if u.endswith(".parquet")}
        for shard in self._shards:
            # A run may have died between writing a part and deleting its units, or before merging.
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
            table = pa.concat_tables([fs.read_table(unit_uri(self._out, u)) for u in shard.units])
            part = fs.join(self._out, "masks", part_name(shard.part))
            fs.write_bytes(part, to_parquet(table, self._metadata))
            self._merged.add(shard.part)
        for done in self._done.intersection(shard.units):
            fs.delete(unit_uri(self._out, done))


def unread_images(out: str, files: Iterable[fs.ListedFile]) -> np.ndarray:
    """Return the ids of listed images that an output could not read, which may pass; int64."""
    tables = mask_columns(out, ["image_id", "status"])
    failed = (table.filter(pc.is_in(table["status"], _UNREAD)) for table in tables)
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

"""Mining: embed every view, keep its patch features, and find its nearest neighbours."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from stego_core.config.backbone import BackboneConfig
from stego_core.config.load import dump_toml, fingerprint
from stego_core.config.schema import MineJob
from stego_core.datasets.demo import resolve_demo
from stego_core.datasets.directory import Dataset, open_dataset
from stego_core.distributed.cluster import connect, plan_actors
from stego_core.distributed.data import check_data, plan_check, select_images
from stego_core.distributed.estimate import (
    fate,
    feature_width,
    lacking_room,
    mining_time,
    store_bytes,
    training_time,
    views_per_image,
)
from stego_core.distributed.fetch import SquareViews, fetch_unit
from stego_core.distributed.mine_failures import (
    forget_failures,
    quarantine_failures,
    views_key,
)
from stego_core.distributed.mine_record import differing_keys, mining_record, replace_others
from stego_core.distributed.mine_stages import EmbedProbe, EmbedWorker, count_unit
from stego_core.distributed.precision import settle_precision, told_precision
from stego_core.distributed.progress import Progress
from stego_core.distributed.search import search_neighbors
from stego_core.distributed.units import Stage, run_units, units_at_once
from stego_core.errors import ConfigError
from stego_core.model.registry import find_backbone
from stego_core.model.weights import ResolvedWeights, resolve_weights
from stego_core.neighbors.plan import plan_search
from stego_core.storage import fs
from stego_core.storage.feature_store import read_views, unit_names
from stego_core.storage.lease import Lease, hold
from stego_core.storage.manifest import Manifest, digest_files, write_manifest
from stego_core.storage.run import RunDirectory
from stego_core.training.views import view_side

logger = logging.getLogger(__name__)

MINE_REUSE = "mine: reuse"  # the line of a plan, as the next
MINE_AGAIN = "mine: reuse, and try again what could not be read"
_UNIT_VIEWS = 64  # views of one work unit, so that a unit takes seconds on a CPU


@dataclass(frozen=True, slots=True)
class Mined:
    """What mining leaves for training.

    Attributes:
        dataset: images and, perhaps, labels.
        manifest: of the images.
        store_uri: folder of the feature store.
        is_stored: whether patch features are in it, or embeddings only.
        key: fingerprint of everything the features were computed from.
        weights: of the backbone.
        backbone: its settings, with the precision that was taken.
    """

    dataset: Dataset
    manifest: Manifest
    store_uri: str
    is_stored: bool
    key: str
    weights: ResolvedWeights
    backbone: BackboneConfig


def plan_mine(job: MineJob, *, shared: str | None = None) -> list[str]:
    """Return what a run would do, one line each, touching nothing (`shared`: see `mine`)."""
    record = find_backbone(job.backbone.name)
    lines = [f"run directory: {job.out}", f"backbone: {record.timm_name} ({record.licence})"]
    root = resolve_demo(job.data.root, write=False)
    if root is None:
        return [*lines, "images: the demo pictures, not written yet", "mine: to do"]
    dataset = open_dataset(root, job.data.split)
    files = select_images(job.data, dataset)
    num_views = len(files) * views_per_image(job)
    size = store_bytes(job, record, len(files))
    is_stored = size <= job.store.max_bytes
    units = -(-len(files) // _unit_images(job))
    run = RunDirectory(job.out, job="plan")
    if job.backbone.precision == "auto":
        job = _with_precision(job, told_precision(run))
    settings = mining_record(job, digest_files(files))
    keys = differing_keys(run, settings | {"stored": is_stored})
    what = f"mine: to do, {units} units{mining_time(job, record, num_views)}"
    if keys and not job.overwrite:
        what = f"mine: refused without --overwrite, other than what is there: {', '.join(keys)}"
    elif not keys and run.read_json("mine.json"):
        what = MINE_AGAIN if job.retry else MINE_REUSE
    elif is_stored and (problem := lacking_room(shared or run.path("features"), size)):
        what = f"mine: {problem}"
    return [
        *lines,
        f"images: {dataset.images_uri}: {len(files)}, labels: {dataset.labels_uri or 'none'}",
        *plan_check(job.data, dataset, files, job.limits),
        f"views: {num_views} ({job.views.crops}), features: {fate(job, size)}",
        plan_search(job.neighbors, num_views, feature_width(job, record)).line(job.neighbors),
        what,
        *training_time(job, record, num_views, is_stored=is_stored),
    ]


def mine_neighbors(job: MineJob, run: RunDirectory) -> None:
    """Mine the neighbours of `job.data` into the run directory (see `mine`)."""
    source = find_images(job)
    with hold(job.out) as lease, connect(debug=job.debug):
        mine(job, run, source, lease)


def find_images(job: MineJob) -> tuple[Dataset, Sequence[fs.ListedFile]]:
    """Return the data set and its images: asked before Ray starts, since a path may be wrong.

    Raises:
        InputError: if there are no images.
    """
    root = resolve_demo(job.data.root, write=True)
    assert root is not None  # noqa: S101 - write=True always returns a folder
    dataset = open_dataset(root, job.data.split)
    return dataset, select_images(job.data, dataset)


def mine(
    job: MineJob,
    run: RunDirectory,
    source: tuple[Dataset, Sequence[fs.ListedFile]],
    lease: Lease,
    *,
    shared: str | None = None,
    retried: set[str] | None = None,
) -> Mined:
    """Embed all views and find their neighbours; reuse what an earlier run left.

    `source` is what `find_images` returned. Results lie below a key of all that determines them, so
    a stale one is never reused. Features go to the folder `shared`, if given, from which none is
    deleted: minings that differ in their search only have them in common, and name those in
    `retried` whose failed images have been looked at again already.

    Raises:
        InputError: if no image is usable.
        ConfigError: if the disk has no room for the features.
        TooManyFailures: if more images can't be used than `max_failed` allows.
        CheckpointError: if the run is of other images or settings, or of another job.
        ClusterError: if another job has taken over the lease of the run directory.
    """
    dataset, files = source
    run.refuse_outputs("metrics.json", "fingerprint.json", "trials.parquet", "mined")
    check_data(run, job.data, dataset, files, job.limits)
    backbone = find_backbone(job.backbone.name)
    # Asked before hours of embedding: whether FAISS is there, if it is wanted.
    plan_search(job.neighbors, len(files) * views_per_image(job), feature_width(job, backbone))
    weights = resolve_weights(backbone, job.backbone.weights)
    size = store_bytes(job, backbone, len(files))
    is_stored = size <= job.store.max_bytes
    job = _with_precision(job, settle_precision(run, job.backbone.precision))
    record = mining_record(job, digest_files(files))
    key = fingerprint(record, weights.sha256, is_stored)
    store = fs.join(shared or run.path("features"), key)
    if is_stored:
        _require_room(store if shared else run.path("features"), size)
    replace_others(job, run, key, record | {"stored": is_stored}, weights.sha256)
    fs.write_bytes(run.path("config.resolved.toml"), dump_toml(job).encode())
    manifest_uri = fs.join(store, "manifest.parquet")
    manifest = write_manifest(manifest_uri, files, unit_images=_unit_images(job))
    mined = Mined(dataset, manifest, store, is_stored, key, weights, job.backbone)
    if job.retry and store not in (retried or ()):
        forget_failures(store, manifest)
    _embed(job, run, mined, lease)
    views = read_views(store, manifest.num_units)
    quarantine_failures(job, run, views, manifest, store_uri=store)
    mined = replace(mined, key=views_key(key, views))
    lease.check()
    search = search_neighbors(job, run, views, key=mined.key)
    lease.check()
    told = {"record": record | {"stored": is_stored}, "views": len(views.image_ids)}
    run.write_json("mine.json", _identity(mined) | told | {"search": search})
    return mined


def _identity(mined: Mined) -> dict[str, Any]:
    return {
        "key": mined.key,
        "features": mined.store_uri.rpartition("/")[2],
        "weights": {"source": mined.weights.source, "sha256": mined.weights.sha256},
    }


def _require_room(folder: str, size: int) -> None:
    if problem := lacking_room(folder, size):
        raise ConfigError(problem)


def _with_precision(job: MineJob, precision: str) -> MineJob:
    known = cast("Literal['auto', 'fp32', 'bf16']", precision)
    return replace(job, backbone=replace(job.backbone, precision=known))


def _unit_images(job: MineJob) -> int:
    return max(1, _UNIT_VIEWS // views_per_image(job))


def _embed(job: MineJob, run: RunDirectory, mined: Mined, lease: Lease) -> None:
    manifest = mined.manifest

    def pending() -> list[int]:
        done = unit_names(mined.store_uri)
        return [unit for unit in range(manifest.num_units) if unit not in done]

    left = pending()
    if not left:
        run.event("mine/reused", key=mined.key)
        logger.info("features: reused, key %s", mined.key)
        return
    actors = plan_actors(job.workers, at_least=job.min_workers)
    sizes = manifest.sizes()
    done = manifest.num_images - sum(sizes[unit] for unit in left)
    at_once = units_at_once(actors)
    progress = Progress(run, stage="mine", total=manifest.num_images, at_once=at_once, done=done)
    run.status("running", stage="mine")
    side = view_side(job.views, find_backbone(job.backbone.name).patch_size)
    receipts = run_units(
        pending,
        fetch=Stage(
            fetch_unit,
            {
                "manifest": manifest,
                "prepare": SquareViews(job.views, side=side, compat=job.compat),
                "limits": job.limits,
                "root": mined.dataset.images_uri,
            },
        ),
        work=Stage(
            EmbedWorker,
            {
                "job": job,
                "device": actors.device,
                "threads": actors.threads,
                "store_uri": mined.store_uri,
                "is_stored": mined.is_stored,
                "weights_sha256": mined.weights.sha256,
            },
            probe=EmbedProbe,
        ),
        finish=Stage(count_unit, {}),
        actors=actors,
        seconds=job.limits.max_seconds,
        debug=job.debug,
    )
    for receipt in receipts:
        lease.check()
        progress.add(receipt["statuses"])
    progress.finish()

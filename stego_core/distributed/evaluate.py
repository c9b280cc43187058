"""Scoring a model against labels: one global confusion matrix for each head, summed over units."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stego_core.config.compat import MineCompat
from stego_core.config.load import dump_toml
from stego_core.config.schema import EvaluateJob, EvaluateStoreConfig, ViewConfig
from stego_core.datasets.demo import DEMO
from stego_core.datasets.directory import Dataset, open_dataset
from stego_core.distributed.cluster import connect, plan_actors
from stego_core.distributed.data import check_data, plan_check, select_images
from stego_core.distributed.estimate import evaluated_bytes, fate, predicting_time
from stego_core.distributed.evaluate_stages import (
    EvaluateWorker,
    fetch_labelled,
    pass_on,
    without_store,
)
from stego_core.distributed.evaluate_tables import Counted, write_tables
from stego_core.distributed.fetch import Prepare, SquareViews, WholeImage
from stego_core.distributed.precision import settle_precision
from stego_core.distributed.progress import Progress
from stego_core.distributed.quarantine import write_quarantine
from stego_core.distributed.units import Stage, run_units, units_at_once
from stego_core.errors import CheckpointError, InputError
from stego_core.inference.crf import describe_crf, require_crf
from stego_core.model.checkpoint import find_model, load_tensors
from stego_core.model.registry import find_backbone
from stego_core.storage import fs
from stego_core.storage.lease import Lease, hold
from stego_core.storage.manifest import Manifest, write_manifest
from stego_core.storage.run import RunDirectory
from stego_core.training.views import view_side

logger = logging.getLogger(__name__)


def plan_evaluate(job: EvaluateJob) -> list[str]:
    """Return what a run would do, one line each, without touching anything."""
    dataset = _labelled(job)
    files = select_images(job.data, dataset)
    folder = find_model(job.model)
    return [
        f"model: {folder}",
        f"images: {dataset.images_uri}: {len(files)}",
        f"labels: {dataset.labels_uri}",
        *plan_check(job.data, dataset, files, job.limits),
        *_plan_time(job, folder, len(files)),
        f"{describe_crf(job.predict, is_on=job.crf)}, flip: {'on' if job.flip else 'off'}",
        _plan_store(job, folder, len(files)),
    ]


def _plan_time(job: EvaluateJob, folder: str, num_images: int) -> list[str]:
    try:
        backbone = json.loads(fs.read_bytes(fs.join(folder, "model.json"))).get("backbone")
    except ValueError as error:
        raise CheckpointError(f"{folder}/model.json can't be read: {error}") from error
    lines = predicting_time(job, backbone, num_images) if backbone else []
    return [*lines, *(["... less where features are stored"] if lines and job.store.uri else [])]


def _plan_store(job: EvaluateJob, folder: str, num_images: int) -> str:
    if job.store.uri is None:
        return "features: not stored (store.uri)"
    size = evaluated_bytes(job, _backbone_of(folder), num_images)
    return f"features: {fate(job, size)} in {job.store.uri}"


def _backbone_of(folder: str) -> dict[str, Any]:
    """Return the settings of a model's backbone.

    Raises:
        CheckpointError: if the model is damaged, or says nothing of its backbone.
    """
    backbone = load_tensors(folder, "model")[1].get("backbone")
    if not isinstance(backbone, dict) or not {"name", "feature", "blocks"} <= backbone.keys():
        raise CheckpointError(f"{folder}/model.json does not say which backbone the model has")
    return backbone


def _within_budget(job: EvaluateJob, backbone: dict[str, Any], num_images: int) -> EvaluateJob:
    """Return the job, without its store if the features would not fit there."""
    size = evaluated_bytes(job, backbone, num_images)
    if job.store.uri is None:
        return job
    fs.exists(job.store.uri)  # a store that does not answer ends the job here, with its reason
    if size <= job.store.max_bytes:
        return job
    logger.warning("features: %s", fate(job, size))
    return replace(job, store=EvaluateStoreConfig())


def _labelled(job: EvaluateJob) -> Dataset:
    if job.data.root == DEMO:
        raise InputError("the demo pictures have no labels: give --data.root with labels/<split>/")
    dataset = open_dataset(job.data.root, job.data.split)
    if dataset.labels_uri is None:
        raise InputError(
            f"{job.data.root} has no labels/{job.data.split}/: evaluation needs label files, "
            "segment_bucket.py does not"
        )
    return dataset


def _checked(job: EvaluateJob, run: RunDirectory) -> tuple[Dataset, Sequence[fs.ListedFile]]:
    """Return the labelled data set and its images, at least one of which has a label file."""
    dataset = _labelled(job)
    files = select_images(job.data, dataset)
    if not check_data(run, job.data, dataset, files, job.limits).pairs:
        raise InputError(
            f"none of the {len(files)} images in {dataset.images_uri} has a label file"
        )
    return dataset, files


def evaluate(job: EvaluateJob, run: RunDirectory) -> None:
    """Score `job.model` on a labelled split; write `metrics.json` and `metrics/`.

    Raises:
        InputError: if there are no images, no labels, or no pixel to score.
        TooManyFailures: if more images can't be used than `max_failed` allows.
        CheckpointError: if there is no model, or another job writes to `job.out`.
    """
    if job.crf:
        require_crf(job.predict.crf)
    folder = find_model(job.model)
    backbone = _backbone_of(folder)  # damaged files end the job here, before it leaves anything
    with hold(job.out) as lease:
        run.refuse_outputs("mine.json", "model", "fingerprint.json", "trials")
        dataset, files = _checked(job, run)
        for name in ("metrics.json", "protocol.json", "metrics"):  # of an earlier evaluation
            fs.delete(run.path(name))
        fs.write_bytes(run.path("config.resolved.toml"), dump_toml(job).encode())
        manifest = write_manifest(
            run.path("evaluate-manifest.parquet"), files, unit_images=job.predict.unit_images
        )
        job = _within_budget(job, backbone, manifest.num_images)
        counted = _count(job, run, (folder, backbone["name"]), dataset, manifest, lease)
        lease.check()
        failed = sorted(counted.failed, key=lambda row: int(row["image_id"]))
        write_quarantine(run, failed, num_images=manifest.num_images, max_failed=job.max_failed)
        write_tables(job, run, dataset, counted)


def _count(
    job: EvaluateJob,
    run: RunDirectory,
    model: tuple[str, str],
    dataset: Dataset,
    manifest: Manifest,
    lease: Lease,
) -> Counted:
    folder, backbone_name = model
    patch = find_backbone(backbone_name).patch_size
    found = Counted()
    done: set[int] = set()
    fetch = {"manifest": manifest, "prepare": _prepare(job, patch)}
    run.status("running", stage="evaluate")
    with connect(debug=job.debug):
        actors = plan_actors(job.actors)
        found.precision = settle_precision(run, job.precision, is_kept=False)
        progress = Progress(
            run, stage="evaluate", total=manifest.num_images, at_once=units_at_once(actors)
        )
        receipts = run_units(
            lambda: [unit for unit in range(manifest.num_units) if unit not in done],
            fetch=Stage(fetch_labelled, fetch | {"limits": job.limits, "dataset": dataset}),
            work=Stage(
                EvaluateWorker,
                {
                    "model": folder,
                    "precision": found.precision,
                    "device": actors.device,
                    "threads": actors.threads,
                    "job": job,
                },
                probe=without_store,
            ),
            finish=Stage(pass_on, {}),
            actors=actors,
            seconds=job.limits.max_seconds,
            debug=job.debug,
        )
        for receipt in receipts:
            lease.check()
            found.add(receipt)
            done.add(receipt["unit"])
            progress.add(receipt["statuses"])
        progress.finish()
    if job.store.uri is not None:
        _tell_of_store(run, job.store.uri, found.passes)
    return found


def _tell_of_store(run: RunDirectory, uri: str, passes: Counter[str]) -> None:
    counts = {name: passes[name] for name in ("read", "kept", "computed")}
    run.event("evaluate/features", uri=uri, **counts)
    logger.info(
        "features: %d passes read from %s, %d kept there", counts["read"], uri, counts["kept"]
    )
    if counts["computed"]:
        logger.warning("features of %d passes could not be kept in %s", counts["computed"], uri)


def _prepare(job: EvaluateJob, patch: int) -> Prepare:
    resolution, nearest = job.predict.resolution, job.compat.nearest_images
    if job.compat.centre_crop:
        square = ViewConfig(resolution=resolution)
        compat = MineCompat(nearest_images=nearest)
        return SquareViews(square, side=view_side(square, patch), compat=compat)
    return WholeImage(resolution=resolution, patch=patch, nearest=nearest)

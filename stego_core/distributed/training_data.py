"""What a training sees and what its model file says, from what mining left."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stego_core.config.method import settled_loss
from stego_core.config.schema import TrainJob
from stego_core.distributed.mine import Mined
from stego_core.distributed.stream import StreamSettings
from stego_core.distributed.stream_reads import ViewImages
from stego_core.errors import SchemaError
from stego_core.images.views import ViewCutter
from stego_core.model.backbone import load_backbone
from stego_core.model.checkpoint import load_tensors
from stego_core.model.consistency import SMOOTHING, consistent_projection
from stego_core.model.registry import find_backbone
from stego_core.model.segmenter import model_card
from stego_core.model.whitening import Whitening, fit_whitening
from stego_core.neighbors.rerank import rerank_neighbors
from stego_core.neighbors.table import neighbor_indices, read_table
from stego_core.storage import fs
from stego_core.storage.feature_store import StoredFeatures, Views
from stego_core.training.calibration import KINDS, calibrate
from stego_core.training.concepts import CODEBOOK_TOKENS, find_concepts
from stego_core.training.loop import TrainContext, TrainData
from stego_core.training.maps import sample_tokens
from stego_core.training.matching import match_tokens
from stego_core.training.optional import check_sources, needs_pixels
from stego_core.training.views import (
    FeatureSource,
    FromBackbone,
    FromStore,
    LabelSource,
    Whitened,
    view_side,
)
from stego_core.training.workers import from_first_worker


def training_data(
    job: TrainJob,
    mined: Mined,
    views: Views,
    context: TrainContext,
    *,
    features: FeatureSource,
    device: str,
) -> TrainData:
    """Return what a training of these settings sees; `job.out` has the neighbours.

    Args:
        job: the settings.
        mined: what mining left.
        views: of the store.
        context: of the training.
        features: of the views.
        device: of torch, for a backbone that optional losses need.
    """
    neighbors_uri = fs.join(job.out, "neighbors")
    table = read_table(neighbors_uri, key=mined.key)
    whitening = _whitening(job, features, len(views.image_ids))
    neighbors = _neighbors(job, table, views, whitening)
    if whitening is not None and job.head.consistent:
        whitening = _consistent(job, features, whitening, neighbors)
    seen = features if whitening is None else Whitened(features, whitening)
    rows = mined.manifest.read(["image_id", "path"])
    paths = dict(zip(rows["image_id"].to_pylist(), rows["path"].to_pylist(), strict=True))
    labels, num_classes = None, 0
    if mined.dataset.labels_uri is not None:
        labels = LabelSource(mined.dataset, views, paths, config=job.views, limits=job.limits)
        num_classes = from_first_worker(partial(_num_classes, labels, context))
        labels = labels if num_classes else None
    check_sources(job.loss, has_labels=labels is not None)
    given = {kind: getattr(job.loss, kind).shift for kind in KINDS}
    is_fixed = job.loss.shifts == "fixed"
    calibration = calibrate(seen, neighbors, seed=job.seed, shifts=given if is_fixed else None)
    mode = settled_loss(job.loss, job.head).shifts
    context.event("calibration", mode=mode, **asdict(calibration))
    return TrainData(
        features=features,
        neighbors=neighbors,
        channels=seen.read(np.zeros(1, np.int64)).shape[1],
        labels=labels,
        num_classes=num_classes,
        side=view_side(job.views, find_backbone(job.backbone.name).patch_size),
        shifts=calibration.shifts if mode == "auto" else {},
        whitening=whitening,
        class_tokens=views.class_tokens,
        pixels=_pixels(job, mined, views, device=device) if needs_pixels(job.loss) else None,
        concepts=_concepts(job, seen, len(views.image_ids)),
    )


def _num_classes(labels: LabelSource, context: TrainContext) -> int:
    folder = context.resume_folder()
    if folder is None:
        return labels.num_classes()
    # A label file that a store does not give this time must not change the training's model.
    weight = load_tensors(folder, "state")[0].get("model.linear_probe.classifier.weight")
    return 0 if weight is None else len(weight)


def _concepts(job: TrainJob, seen: FeatureSource, num_views: int) -> torch.Tensor | None:
    if job.loss.energy != "concept":
        return None
    tokens = sample_tokens(seen, num_views, CODEBOOK_TOKENS, seed=job.seed)
    return find_concepts(tokens, seed=job.seed)


def _whitening(job: TrainJob, features: FeatureSource, num_views: int) -> Whitening | None:
    if not job.head.whiten:
        return None
    tokens = sample_tokens(features, num_views, job.clusters.sample, seed=job.seed)
    return fit_whitening(tokens, job.head.whiten, details=job.head.details)


def _neighbors(
    job: TrainJob, table: pa.Table, views: Views, whitening: Whitening | None
) -> np.ndarray:
    """Return the neighbours that are used, (V, N); ADR 24 says why consistency re-ranks them."""
    if whitening is None or not job.head.consistent:
        return neighbor_indices(table, views, job.neighbors.used)
    candidates = neighbor_indices(table, views, job.neighbors.stored)
    embeddings = whitening.project(torch.tensor(views.embeddings)).numpy()
    return rerank_neighbors(candidates, embeddings, job.neighbors.used)


def _consistent(
    job: TrainJob, features: FeatureSource, whitening: Whitening, neighbors_VN: np.ndarray
) -> Whitening:
    whitened = Whitened(features, whitening)
    matches = match_tokens(
        whitened.read,
        neighbors_VN,
        expect=whitened.expect,
        seed=job.seed,
        # Things, not single tokens, are what directions should tell apart.
        temperature=SMOOTHING,
    )
    projection = consistent_projection(matches.tokens, matches.differences)
    return whitening.followed_by(projection)


def local_features(job: TrainJob, mined: Mined, views: Views, *, device: str) -> FeatureSource:
    """Return the stored features, or a backbone in this process where there are none."""
    if mined.is_stored:
        stored = StoredFeatures(mined.store_uri, mined.manifest.num_units)
        if len(stored) != len(views.image_ids):  # else views would read each other's features
            raise SchemaError(
                f"{mined.store_uri} has features of {len(stored)} of {len(views.image_ids)} views: "
                "delete it, and mine again"
            )
        return FromStore(stored)
    return _pixels(job, mined, views, device=device)


def stream_settings(job: TrainJob, mined: Mined, views: Views) -> StreamSettings:
    """Return what features of these views are, where they are not stored."""
    patch = find_backbone(job.backbone.name).patch_size
    side = view_side(job.views, patch)
    return StreamSettings(
        backbone=mined.backbone,
        cutter=ViewCutter(side, job.views, job.limits, job.compat),
        images=ViewImages(views.image_ids, views.crops, _uris(mined)),
        # An embedding is the mean of a view's features.
        shape=(side // patch, side // patch, views.embeddings.shape[1]),
        weights_sha256=mined.weights.sha256,
    )


def _uris(mined: Mined) -> dict[int, str]:
    rows = mined.manifest.read(["image_id", "image_uri"])
    return dict(zip(rows["image_id"].to_pylist(), rows["image_uri"].to_pylist(), strict=True))


def _pixels(job: TrainJob, mined: Mined, views: Views, *, device: str) -> FromBackbone:
    return FromBackbone(
        load_backbone(mined.backbone, device=device, sha256=mined.weights.sha256),
        views,
        _uris(mined),
        config=job.views,
        limits=job.limits,
        compat=job.compat,
    )


def trained_card(job: TrainJob, mined: Mined, views: Views, data: TrainData) -> dict[str, Any]:
    """Return `model.json` of a training."""
    return model_card(
        weights=mined.weights,
        config=mined.backbone,
        head=job.head,
        cluster_names=[f"cluster {number}" for number in range(job.clusters.total)],
        num_classes=data.num_classes,
        class_names=list(mined.dataset.class_names),
        training={
            "views": len(views.image_ids),
            "images": mined.manifest.num_images,
            "data_digest": mined.manifest.digest,
            "steps": job.train.steps,
            "seed": job.seed,
            "shifts": data.shifts,
        },
    )

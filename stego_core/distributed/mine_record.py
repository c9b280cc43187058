"""What determines features and neighbours, and what becomes of those that others determined."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict
from typing import Any

from stego_core.config.schema import MineJob
from stego_core.errors import CheckpointError
from stego_core.model.registry import find_backbone
from stego_core.storage import fs
from stego_core.storage.run import RunDirectory, differing

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{16}")  # of a store's folder
# Those that change features or embeddings; the others change what is made of them.
_FEATURE_SWITCHES = ("nearest_images", "jpeg_crops", "mining_dropout")
_STORE_VERSION = 2  # of what a unit's files hold: 2 has class tokens


def mining_record(job: MineJob, data_digest: str) -> dict[str, Any]:
    """Return the settings and images that determine features, beside weights and the store."""
    positions = job.backbone.positions
    return ({} if positions == "exact" else {"positions": positions}) | {
        "store": _STORE_VERSION,
        "backbone": find_backbone(job.backbone.name).timm_name,
        "feature": job.backbone.feature,
        "blocks": list(job.backbone.blocks) if job.backbone.feature == "blocks" else None,
        "precision": job.backbone.precision,
        "views": asdict(job.views),
        "limits": job.limits.record(),
        "data": data_digest,
        "compat": {name: getattr(job.compat, name) for name in _FEATURE_SWITCHES},
        "dropout_seed": job.seed if job.compat.mining_dropout else None,
    }


def differing_keys(
    run: RunDirectory, record: dict[str, Any], weights_sha256: str | None = None
) -> list[str]:
    """Return what an earlier mining of a run had differently.

    Args:
        run: the run directory.
        record: of `mining_record`, and `stored`.
        weights_sha256: of the backbone; None does not compare.
    """
    told = run.read_json("mine.json")
    if told is None:
        return []
    keys = differing({"stored": record["stored"]} | told["record"], json.loads(json.dumps(record)))
    is_other = weights_sha256 not in (None, told["weights"]["sha256"])
    return [*keys, *(["weights"] if is_other else [])]


def replace_others(
    job: MineJob, run: RunDirectory, key: str, record: dict[str, Any], weights_sha256: str
) -> None:
    """Delete features of other images or settings: they are large and can be computed again.

    Args:
        job: the settings.
        run: the run directory.
        key: of the features that stay.
        record: of `mining_record`, and `stored`.
        weights_sha256: of the backbone.

    Raises:
        CheckpointError: if a mining has come to its end with others, and none may be replaced.
    """
    if keys := differing_keys(run, record, weights_sha256):
        if not job.overwrite:
            raise CheckpointError(
                f"{job.out} was mined from other images or settings ({', '.join(keys)} differ): "
                "give another --out, or --overwrite"
            )
        fs.delete(run.path("mine.json"))  # else a run that dies in between would be refused
    drop_stores(run.path("features"), keep={key})


def drop_stores(folder: str, *, keep: set[str]) -> None:
    """Delete the features in a folder whose keys are none of these."""
    for name in fs.list_names(folder):
        if name not in keep and _KEY.fullmatch(name):  # anything else is not of this project
            logger.info("the settings or images have changed: dropping features/%s", name)
            fs.delete(fs.join(folder, name))

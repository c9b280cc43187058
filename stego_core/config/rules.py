"""Rules between settings: which values of two or more do not fit together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, cast

from stego_core.config.diagnose import flatten, holds_credentials, show
from stego_core.config.schema import Job
from stego_core.config.space import space_problems, study_settings


def clashes(job: Job) -> list[str]:
    """List the settings that do not fit together, one line each."""
    value: dict[str, Any] = {
        path: reduce(getattr, path.split("."), cast("Any", job)) for path in flatten(type(job))
    }
    lines = [
        f"{path}: holds credentials; take them out of the URI and set them in the environment"
        for path, text in value.items()
        if isinstance(text, str) and holds_credentials(text)
    ]

    def clash(*paths: str, rule: str) -> None:
        lines.append(_clash(value, *paths, rule=rule))

    if value.get("neighbors.used", 0) > value.get("neighbors.stored", 0):
        clash("neighbors.used", "neighbors.stored", rule="can't use more neighbours than stored")
    lines += _check_workers(value)
    if {*value.get("data.ignore_classes", ())} & {*value.get("data.score_classes", ())}:
        clash("data.ignore_classes", "data.score_classes", rule="a class can't be in both")
    weights = [path for path in value if path.startswith("loss.") and path.endswith(".weight")]
    if weights and not any(value[path] for path in weights):
        clash(*weights, rule="at least one must be more than 0")
    for path in ("views.resolution", "predict.resolution"):
        if value.get(path, 16) < 16:
            clash(path, rule="must be at least 16")
    if value.get("backbone.feature") == "blocks" and not value["backbone.blocks"]:
        clash("backbone.blocks", rule="must name a block when backbone.feature is blocks")
    if value.get("space"):
        lines += space_problems(value["space"], study_settings())
    return lines + _check_options(value)


def _check_options(value: Mapping[str, Any]) -> list[str]:
    """List the options of the method that do not fit together, one line each."""
    lines = []

    def clash(*paths: str, rule: str) -> None:
        lines.append(_clash(value, *paths, rule=rule))

    weights = ["loss.self.weight", "loss.random.weight"]
    if value.get("loss.energy") == "smooth" and not any(value[path] for path in weights):
        clash("loss.energy", *weights, rule="it has no other kinds of pairs")
    if value.get("loss.energy") == "concept" and value["loss.local"]:
        clash("loss.energy", "loss.local", rule="it has no pairs to mix")
    if value.get("loss.energy") == "concept" and value["loss.oracle"]:
        clash("loss.energy", "loss.oracle", rule="its concepts are those of features")
    if value.get("predict.scales") == ():
        clash("predict.scales", rule="must name a size")
    if value.get("predict.crf_device") == "model" and value["predict.crf"] == "dense":
        clash("predict.crf_device", "predict.crf", rule="pydensecrf runs on CPUs only")
    return lines + _check_clusters(value)


def _check_clusters(value: Mapping[str, Any]) -> list[str]:
    lines = []

    def clash(*paths: str, rule: str) -> None:
        lines.append(_clash(value, *paths, rule=rule))

    if value.get("clusters.over", 1) > 1 and value["clusters.refit"] == "none":
        clash("clusters.over", "clusters.refit", rule="the trained clusters can't be merged")
    if value.get("clusters.alpha") and value["clusters.refit"] != "none":
        clash("clusters.alpha", "clusters.refit", rule="a refit replaces the trained clusters")
    if value.get("clusters.alpha") and value["loss.energy"] == "smooth":
        clash("clusters.alpha", "loss.energy", rule="it trains clusters by its own loss")
    if value.get("clusters.passes") and value["clusters.refit"] != "kmeans":
        clash("clusters.passes", "clusters.refit", rule="passes go over clusters of k-means only")
    if value.get("clusters.passes") and value["clusters.boost"] != "none":
        clash("clusters.passes", "clusters.boost", rule="passes would undo the boost")
    return lines


def _check_workers(value: dict[str, Any]) -> list[str]:
    batch, most = value.get("train.batch", 0), value.get("workers", 1)
    least = value.get("min_workers") or most
    if least > most:
        return [_clash(value, "min_workers", "workers", rule="can't be more than the workers")]
    if batch % most:
        rule = "the batch must be a multiple of the workers"
        return [_clash(value, "train.batch", "workers", rule=rule)]
    if wrong := [count for count in range(least, most) if batch % count]:
        paths = "train.batch", "workers", "min_workers"
        rule = f"the batch must be a multiple of all numbers between them, {wrong[-1]} is none"
        return [_clash(value, *paths, rule=rule)]
    return []


def _clash(value: Mapping[str, Any], *paths: str, rule: str) -> str:
    return ", ".join(f"{path} = {show(value[path])}" for path in paths) + f": {rule}"

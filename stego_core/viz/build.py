"""From what the jobs left behind to the report: reads masks, images, events and metrics."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from stego_core.config.schema import ReportJob
from stego_core.errors import ImageProblem, InputError, SchemaError
from stego_core.images.apart import ApartDecoder
from stego_core.images.decode import ImageFailure
from stego_core.images.geometry import resize_image
from stego_core.masks.classes import read_names
from stego_core.masks.codec import decode_mask
from stego_core.masks.palette import cluster_colors
from stego_core.masks.verify import mask_files
from stego_core.storage import fs
from stego_core.storage.lease import hold
from stego_core.storage.run import RunDirectory
from stego_core.viz.calibration import CalibrationFacts, read_calibration
from stego_core.viz.confusion import read_confusion
from stego_core.viz.numbers import percent
from stego_core.viz.report import Failure, ReportFacts, ReportImage, write_report
from stego_core.viz.tables import plain_rows

logger = logging.getLogger(__name__)
_MAX_SIDE = 640  # the report shows thumbnails: nothing larger is kept
_FAILURES = 24  # the worst images of an evaluation that the report shows
_CURVES = ("loss/total", "loss/self", "loss/knn", "loss/random", "loss/cluster")


def plan_report(job: ReportJob) -> list[str]:
    """Return what a run would do, one line each, without touching anything."""
    parts = mask_files(job.masks)
    return [f"masks: {job.masks}: {len(parts)} file(s)", f"report: {job.masks}/report/index.html"]


def build_report(job: ReportJob, run: RunDirectory) -> None:
    """Write the report of `job.masks` to `report/` below it.

    Raises:
        InputError: if there are no masks.
        CheckpointError: if another job writes it.
    """
    parts = mask_files(job.masks)
    if not parts:
        raise InputError(
            f"{job.masks}/masks holds no masks; run segment_bucket.py --out {job.masks}"
        )
    clusters = cluster_table(parts[0])
    given = read_names(job.names, len(clusters))
    names = [given.get(k) or cluster["name"] for k, cluster in enumerate(clusters)]
    source = RunDirectory(job.masks, job="report")
    with hold(run.uri):
        index = write_report(
            run.uri,
            _images(parts, job, _failures(job)),
            _facts(job, source),
            names,
            cluster_colors(len(names)),
        )
    run.event("report", index=index)
    logger.info("report: %s", index)


def cluster_table(part_uri: str) -> list[dict[str, str]]:
    """Return name and colour of each cluster, as a file of masks has them."""
    metadata = fs.read_footer(part_uri).metadata or {}
    return list(json.loads(metadata[b"stego.clusters"]))


def _failures(job: ReportJob) -> dict[str, Failure]:
    """Return the worst images of an evaluation by URI; none where there was no evaluation.

    Raises:
        SchemaError: if its files can't be read.
    """
    if job.metrics is None:
        return {}
    uri = fs.join(job.metrics, "metrics", "images.parquet")
    rows = plain_rows(uri)[:_FAILURES]
    try:
        told = RunDirectory(job.metrics, job="report").read_json("protocol.json") or {}
        names = dict(zip(told.get("classes", []), told.get("class_names", []), strict=False))
        return {
            row["image_uri"]: Failure(float(row["accuracy"]), _error(row, names))
            for row in rows
            if row["wrong_pixels"]
        }
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise SchemaError(f"{uri} is no table of image scores: {error!r}") from error


def _error(row: Mapping[str, Any], names: Mapping[int, str]) -> str:
    true, there = row["true_class"], row["predicted_class"]
    share = percent(row["wrong_pixels"] / row["pixels"])
    place = f"cluster {row['predicted']}, which has no class"
    if there is not None:
        place = f"{names.get(there, f'class {there}')} (cluster {row['predicted']})"
    return f"{names.get(true, f'class {true}')} as {place}, {share}"


def _images(
    parts: list[str], job: ReportJob, failures: Mapping[str, Failure]
) -> Iterator[ReportImage]:
    """Yield the failures and images spread evenly over all, decoding one at a time."""
    statuses = (fs.read_table(part, ["status"])["status"] for part in parts)
    shown = sum(pc.sum(pc.equal(column, ImageProblem.OK)).as_py() or 0 for column in statuses)
    every = max(1, -(-shown // job.images))
    seen = found = 0
    decoder = ApartDecoder(job.limits)
    for part in parts:
        for table in fs.row_groups(part):
            told = table.select(["image_uri", "status"]).to_pylist()
            for index, row in enumerate(told):
                if row["status"] != ImageProblem.OK:
                    continue
                failure, is_sampled = failures.get(row["image_uri"]), seen % every == 0
                found += failure is not None
                if is_sampled or failure:
                    image = _image(table.slice(index, 1).to_pylist()[0], decoder)
                    if image is not None:
                        yield replace(image, failure=failure, is_sampled=is_sampled)
                seen += 1
    if failures and not found:
        logger.info("none of the worst images of %s is among these masks", job.metrics)


def _image(row: dict[str, Any], decoder: ApartDecoder) -> ReportImage | None:
    try:
        pixels = decoder.image(fs.read_bytes(row["image_uri"]))
    except OSError:
        return None  # moved since: the report shows the others
    if isinstance(pixels, ImageFailure):
        return None
    height, width = pixels.shape[:2]
    scale = min(1.0, _MAX_SIDE / max(height, width))
    pixels = resize_image(pixels, max(1, int(height * scale)), max(1, int(width * scale)))
    return ReportImage(
        name=row["image_uri"].rsplit("/", 1)[-1],
        pixels=pixels,
        labels=decode_mask(row["mask"]["bytes"]).astype(np.int64),
        shares={entry["cluster"]: entry["share"] for entry in row["clusters"]},
        confidence=row["mean_confidence"],
    )


def _facts(job: ReportJob, source: RunDirectory) -> ReportFacts:
    success = source.read_json("_SUCCESS") or {}
    rows = [("images", str(success.get("rows", "?")))]
    rows += [(f"status {k}", str(v)) for k, v in sorted(success.get("statuses", {}).items())]
    rows.append(("masks", job.masks))
    card = json.loads(fs.read_if_exists(fs.join(job.model, "model", "model.json")) or b"{}")
    if card:
        rows += [
            ("model", job.model),
            ("backbone", card["backbone"]["name"]),
            ("backbone weights", card["backbone_weights"]["source"]),
        ]
    if training := card.get("training"):  # an imported model was trained elsewhere
        rows += [
            ("trained on", f"{training['images']} images, {training['views']} views"),
            ("steps", str(training["steps"])),
            ("seed", str(training["seed"])),
            ("shifts", json.dumps(training["shifts"])),
        ]
    events = list(_events(job.model))
    metrics: dict[str, float] = {}
    if job.metrics is not None:
        metrics = RunDirectory(job.metrics, job="report").read_json("metrics.json") or {}
    return ReportFacts(
        title="Unsupervised segmentation",
        rows=rows,
        metrics=metrics,
        quarantine=_quarantine(source),
        curves=_curves(events),
        query=query_line(job.masks),
        calibration=_calibration(events),
        confusion=read_confusion(job.metrics) if job.metrics else None,
    )


def query_line(masks_uri: str, *, python: str = "python") -> str:
    """Return a line for a shell that lets DuckDB find the images with the most of one cluster.

    Args:
        masks_uri: output of segment_bucket.py.
        python: that has DuckDB, whose package brings no command of its own.
    """
    folder = masks_uri.replace("'", "''")  # as SQL writes it
    source = f"'{folder}/masks/*.parquet'"
    query = (
        "SELECT image_uri, c.cluster, round(c.share, 2) AS share "
        "FROM (SELECT image_uri, unnest(clusters) AS c FROM {source}) "
        "ORDER BY share DESC LIMIT 10"
    )
    shown = re.sub(r'(["$`\\])', r"\\\1", query.format(source=source))
    return f"""{python} -c 'import duckdb, sys; duckdb.sql(sys.argv[1]).show()' "{shown}\""""


def _quarantine(source: RunDirectory) -> list[tuple[str, str, str]]:
    rows = plain_rows(source.path("quarantine.parquet"))
    return [(r["image_uri"], r["reason"], r["detail"] or "") for r in rows]


def _events(model_uri: str) -> Iterator[dict[str, Any]]:
    """Yield what a training recorded, in the order of its files."""
    for name in ("events.jsonl", "events-train.jsonl"):
        for line in (fs.read_if_exists(fs.join(model_uri, name)) or b"").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # a line that a killed process left unfinished
            if isinstance(event, dict):
                yield event


def _curves(events: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, dict[int, float]] = {}
    for event in events:
        if event.get("event") != "train/step":
            continue
        for key in _CURVES:
            if key in event:  # steps that were done again after a kill replace the first ones
                curves.setdefault(key, {})[int(event["step"])] = float(event[key])
    return {key: sorted(points.items()) for key, points in curves.items()}


def _calibration(events: Sequence[dict[str, Any]]) -> CalibrationFacts | None:
    found = [event for event in events if event.get("event") == "calibration"]
    return read_calibration(found[-1]) if found else None

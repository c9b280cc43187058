"""Masks to files: a file of the masks table is a task, and done when its part of the index is."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import RayError, RayTaskError

from stego_core.config.export import ExportJob
from stego_core.config.load import dump_toml, fingerprint
from stego_core.distributed.cluster import connect, total
from stego_core.distributed.progress import Progress
from stego_core.distributed.units import last_line
from stego_core.errors import CheckpointError, ClusterError, ImageProblem, InputError, StegoError
from stego_core.images.apart import ApartDecoder
from stego_core.masks.classes import Classes, name_classes, read_names
from stego_core.masks.verify import SUCCESS, mask_files, part_number
from stego_core.storage import fs
from stego_core.storage.lease import Lease, hold
from stego_core.storage.manifest import Manifest, read_manifest
from stego_core.storage.parquet import table_bytes
from stego_core.storage.run import RunDirectory
from stego_core.viz.build import cluster_table
from stego_core.viz.export import INDEX_SCHEMA, Exporter, Names

logger = logging.getLogger(__name__)

_RESULTS = ("index", "labels", "overlays", "classes.txt", "legend.json")  # in this order gone
_THREADS = 8  # of a task: files are written over a network, too
_AT_ONCE = 64  # rows in memory with their pictures
_AHEAD = 2  # tasks for each CPU
_SOURCE = b"stego.source"


def plan_export(job: ExportJob) -> list[str]:
    """Return what a run would do, one line each, without touching anything."""
    parts, manifest, classes = _opened(job)
    lines = [f"masks: {job.masks}: {manifest.num_images} images in {len(parts)} file(s)"]
    ignored = classes.num_clusters - sum(map(len, classes.clusters))
    lines.append(
        f"classes: {len(classes.names)} of {classes.num_clusters} clusters, {ignored} ignored"
    )
    overlays = ", overlays" if job.overlays else ""
    return [*lines, f"output: {job.out}: labels of {job.size} size{overlays}"]


def export_masks(job: ExportJob, run: RunDirectory) -> None:
    """Write a label file for each image with a mask; go on where an earlier run ended.

    Raises:
        InputError: if there are no masks.
        ConfigError: if the names can't be used.
        CheckpointError: if the export holds files of other settings, or another job writes there.
        ClusterError: if Ray can't run the tasks.
    """
    parts, manifest, classes = _opened(job)
    if not fs.exists(fs.join(job.masks, SUCCESS)):
        logger.warning("%s is not complete: what is there is exported", job.masks)
    root = _root(job)
    with hold(job.out) as lease:
        _refuse_others(job, run)
        run.claim(_record(job, classes), overwrite=job.overwrite, clear=lambda: _clear(run))
        fs.write_bytes(run.path("config.resolved.toml"), dump_toml(job).encode())
        run.write_json("legend.json", {"classes": classes.legend()})
        fs.write_bytes(run.path("classes.txt"), "".join(f"{n}\n" for n in classes.names).encode())
        run.status("running", stage="export")
        with connect(debug=job.debug):
            counts = _export(job, run, (parts, manifest), (classes, root), lease)
    run.count(**counts)
    logger.info("%d label files: %s/labels", counts["labels"], job.out)


def _refuse_others(job: ExportJob, run: RunDirectory) -> None:
    """Raise CheckpointError where another job writes: `--overwrite` would delete its labels."""
    if job.out.rstrip("/") == job.masks.rstrip("/"):
        raise CheckpointError(f"{job.out} holds the masks: give another --out")
    told = run.read_json("fingerprint.json")
    if told is not None and told.get("job") != "export":
        raise CheckpointError(f"{job.out} is the output of another job: give another --out")
    run.refuse_others(_RESULTS)


def _opened(job: ExportJob) -> tuple[list[str], Manifest, Classes]:
    parts = mask_files(job.masks)
    if not parts:
        raise InputError(
            f"{job.masks}/masks holds no masks; run segment_bucket.py --out {job.masks}"
        )
    clusters = [cluster["name"] for cluster in cluster_table(parts[0])]
    classes = name_classes(clusters, read_names(job.names, len(clusters)))
    return parts, read_manifest(fs.join(job.masks, "manifest.parquet")), classes


def _record(job: ExportJob, classes: Classes) -> dict[str, Any]:
    """Return all that determines the files of a mask."""
    made_by = fs.read_if_exists(fs.join(job.masks, "fingerprint.json")) or b""
    return {
        "job": "export",
        "masks": fingerprint(made_by.decode()),
        "names": list(classes.names),
        "clusters": [list(members) for members in classes.clusters],
        "size": job.size,
        "overlays": job.overlays,
    }


def _clear(run: RunDirectory) -> None:
    for name in _RESULTS:
        fs.delete(run.path(name))


def _export(
    job: ExportJob,
    run: RunDirectory,
    masks: tuple[Sequence[str], Manifest],
    shown: tuple[Classes, str],
    lease: Lease,
) -> dict[str, int]:
    """Export the parts that are not done; return the counts of all."""
    (parts, manifest), (classes, root) = masks, shown
    indices = {_index_uri(job.out, part) for part in parts}
    for name in fs.list_names(run.path("index")):  # of parts that have no rows any more
        if part_number(name) is not None and run.path("index", name) not in indices:
            fs.delete(run.path("index", name))
    sources = {
        file.path: f"{file.num_bytes} {file.etag}"
        for file in fs.list_files(fs.join(job.masks, "masks"))
    }
    known = [(part, _index_uri(job.out, part), sources[part.rpartition("/")[2]]) for part in parts]
    counts: Counter[str] = Counter()
    left = []
    for part, index_uri, source in known:
        done = _counts_of(index_uri, source)
        left += [(part, index_uri, source)] if done is None else []
        counts.update(done or {})
    rows = manifest.read(["path", "image_id"])
    names = Names(_values(rows["path"]), _values(rows["image_id"]))
    shared = ray.put((names, classes, root))
    ahead = max(1, _AHEAD * int(total("CPU")))
    progress = Progress(
        run,
        stage="export",
        total=max(manifest.num_images, 1),
        at_once=ahead,
        done=counts["images"],
    )
    task = ray.remote(num_cpus=1, max_retries=3)(export_part)
    for found in _done(partial(task.remote, job, shared), left, ahead=ahead):
        lease.check()
        counts.update(found)
        progress.add(
            {ImageProblem.OK: found["labels"], "without": found["images"] - found["labels"]}
        )
    progress.finish()
    return {name: counts[name] for name in ("images", "labels", "overlays")}


def _values(column: pa.ChunkedArray) -> Iterator[Any]:
    return (value for chunk in column.chunks for value in chunk.to_pylist())


def _done(start: Any, left: Sequence[tuple[str, ...]], *, ahead: int) -> Iterator[dict[str, int]]:
    """Yield what the tasks return, as they end; a few are ahead of what is waited for."""
    waiting = iter(left)
    running = [start(*one) for one in islice(waiting, ahead)]
    while running:
        try:
            (first,), running = ray.wait(running)
            found = ray.get(first)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, StegoError | OSError):
                raise cause from error
            raise
        except RayError as error:
            raise ClusterError(f"the export failed, last: {last_line(error)}") from error
        running += [start(*one) for one in islice(waiting, 1)]
        yield found


def export_part(
    job: ExportJob,
    shared: tuple[Names, Classes, str],
    part_uri: str,
    index_uri: str,
    source: str,
) -> dict[str, int]:
    """Write the files of one part of the masks table, then its part of the index.

    Returns:
        How many images, labels and overlays it has.
    """
    names, classes, root = shared
    decoder = ApartDecoder(job.limits) if job.overlays else None
    exporter = Exporter(job.out, classes, job.size == "image", decoder)

    before = _files(index_uri)
    paths: dict[int, str] = {}

    def write(row: dict[str, Any]) -> dict[str, Any]:
        path = row["image_uri"].removeprefix(root)
        if path == row["image_uri"]:  # a scheme in capitals, and others that listing writes anew
            path = paths.get(row["image_id"], path)
        return exporter.write(row, names.of(path, row["image_id"]))

    entries: list[dict[str, Any]] = []
    columns = ["image_id", "image_uri", "status", "detail", "mask", "image_height", "image_width"]
    with ThreadPoolExecutor(_THREADS) as pool:
        for group in fs.row_groups(part_uri, columns):
            if not str(group["image_uri"][0]).startswith(root):
                paths = _paths(job, group["image_id"])
            for start in range(0, group.num_rows, _AT_ONCE):
                entries += pool.map(write, group.slice(start, _AT_ONCE).to_pylist())
    table = pa.Table.from_pylist(entries, INDEX_SCHEMA)
    fs.write_bytes(index_uri, table_bytes(table.replace_schema_metadata({_SOURCE: source})))
    # Of images that have no mask any more, or another name.
    for path in before - _files(index_uri):
        fs.delete(fs.join(job.out, path))
    return _counts(table)


def _files(index_uri: str) -> set[str]:
    try:
        table = fs.read_table(index_uri, ["label", "overlay"])
    except (FileNotFoundError, pa.ArrowInvalid):
        return set()
    return {path for name in table.column_names for path in table[name].to_pylist() if path}


def _paths(job: ExportJob, ids: pa.ChunkedArray) -> dict[int, str]:
    """Return the paths below the input of some images."""
    rows = fs.read_table(fs.join(job.masks, "manifest.parquet"), ["image_id", "path"])
    rows = rows.filter(pc.is_in(rows["image_id"], ids.combine_chunks()))
    return dict(zip(rows["image_id"].to_pylist(), rows["path"].to_pylist(), strict=True))


def _counts_of(index_uri: str, source: str) -> dict[str, int] | None:
    """Return the counts of a part that is done; None if it is not, or its masks have changed."""
    try:
        told = (fs.read_footer(index_uri).metadata or {}).get(_SOURCE, b"").decode()
        return _counts(fs.read_table(index_uri)) if told == source else None
    except (FileNotFoundError, pa.ArrowInvalid):
        return None


def _counts(table: pa.Table) -> dict[str, int]:
    written = {f"{name}s": len(table) - table[name].null_count for name in ("label", "overlay")}
    return {"images": len(table)} | written


def _index_uri(out: str, part_uri: str) -> str:
    name = part_uri.rpartition("/")[2]
    assert part_number(name) is not None  # noqa: S101 - of `mask_files`
    return fs.join(out, "index", name)


def _root(job: ExportJob) -> str:
    """Return what all URIs of images begin with, up to the path below the input."""
    told = json.loads(fs.read_if_exists(fs.join(job.masks, "fingerprint.json")) or b"{}")
    return f"{str(told.get('input', '')).rstrip('/')}/"

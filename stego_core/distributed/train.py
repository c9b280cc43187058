"""Distillation on Ray Train: mines first, then trains the head, then fits the clusters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from stego_core import log
from stego_core.config.load import fingerprint, to_dict
from stego_core.config.method import settled_loss
from stego_core.config.neighbors import search_settings
from stego_core.config.schema import TrainJob
from stego_core.datasets.demo import resolve_demo
from stego_core.datasets.directory import Dataset, open_dataset
from stego_core.distributed.cluster import connect, plan_actors
from stego_core.distributed.mine import MINE_REUSE, Mined, find_images, mine, plan_mine
from stego_core.distributed.selection import Candidates, Fitted, refined
from stego_core.distributed.stream import StreamedFeatures
from stego_core.distributed.stream_plan import plan_stream
from stego_core.distributed.train_context import RayContext
from stego_core.distributed.train_progress import follow
from stego_core.distributed.training_data import (
    local_features,
    stream_settings,
    trained_card,
    training_data,
)
from stego_core.errors import ClusterError, InputError, StegoError
from stego_core.model.checkpoint import load_tensors
from stego_core.model.choose_count import CANDIDATES
from stego_core.model.segmenter import save_segmenter
from stego_core.storage import fs
from stego_core.storage.feature_store import Views, read_views
from stego_core.storage.lease import Lease, hold
from stego_core.storage.manifest import digest_files
from stego_core.storage.retry import retried
from stego_core.storage.run import RunDirectory
from stego_core.training.choose import with_cluster_count
from stego_core.training.loop import train
from stego_core.training.state import find_checkpoint
from stego_core.training.views import FeatureSource
from stego_core.training.workers import from_first_worker

logger = logging.getLogger(__name__)

_KEPT_CHECKPOINTS = 2
_WORKER_FAILURES = 3
_COLLECTIVE_S = 4 * 3600  # others wait so long while rank 0 fits clusters
_RESIZE_S = 60.0  # at most so often are workers taken back: all of them start anew


def plan_train(job: TrainJob) -> list[str]:
    """Return what a run would do, one line each, without touching anything."""
    lines = plan_mine(job)
    record = RunDirectory(job.out, job="plan").read_json("train.json") or {}
    same = record.get("settings") == _settings(job) and MINE_REUSE in lines
    same = same and record.get("labels") == _known_labels(job)
    state = "reuse" if same and fs.exists(fs.join(job.out, "model", "model.json")) else "to do"
    fewest = f"{job.min_workers} to " if job.min_workers else ""
    return [
        *lines,
        f"train: {state}, {job.train.steps} steps of {job.train.batch} views, "
        f"{fewest}{job.workers} worker(s), {_clusters(job, record if same else {})}, "
        f"seed {job.seed}",
    ]


def _known_labels(job: TrainJob) -> str | None:
    root = resolve_demo(job.data.root, write=False)
    return None if root is None else _labels_digest(open_dataset(root, job.data.split))


def _clusters(job: TrainJob, record: dict[str, Any]) -> str:
    if job.clusters.count:
        return f"{job.clusters.total} clusters"
    if "clusters" in record:
        return f"{record['clusters']} clusters (chosen, see events.jsonl)"
    numbers = ", ".join(map(str, CANDIDATES))
    return f"a number of clusters chosen from {numbers}"


def train_model(job: TrainJob, run: RunDirectory) -> None:
    """Train on `job.data` into the run directory; go on where an earlier run ended.

    Raises:
        InputError: if there are no images, or none is usable.
        CheckpointError: if another job writes to the run directory.
        ClusterError: if Ray can't run the workers.
    """
    source = find_images(job)
    with hold(job.out) as lease, connect(debug=job.debug):
        mined = mine(job, run, source, lease)
        settings, labels = _settings(job), _labels_digest(source[0])
        key = fingerprint(settings, mined.key, labels)
        record = run.read_json("train.json") or {}
        if record.get("key") == key and fs.exists(run.path("model", "model.json")):
            logger.info("%s is trained: nothing to do", job.out)
            return
        run.status("running", stage="train")
        folder = _fit(job, run, mined, lease, key=key)
        lease.check()
        tensors, card = load_tensors(folder, "model")
        # Else a job that dies in between leaves this model under the record of the one before.
        fs.delete(run.path("train.json"))
        save_segmenter(run.path("model"), tensors, card)
        clusters = len(card["cluster_names"])
        made_of = {"key": key, "settings": settings, "labels": labels}
        run.write_json("train.json", made_of | {"clusters": clusters})
    run.count(steps=job.train.steps)
    logger.info("model: %s", run.path("model"))


def _labels_digest(dataset: Dataset) -> str | None:
    """Return what tells the labels that the linear probe learns from; None without any."""
    if dataset.labels_uri is None:
        return None
    try:
        files = sorted(fs.list_files(dataset.labels_uri), key=lambda file: file.path)
    except InputError:  # labels may be missing in any way
        return None
    return digest_files(files)


def _settings(job: TrainJob) -> dict[str, Any]:
    """Return what determines the model beside the mined features; not the number of workers."""
    values = to_dict(replace(job, loss=settled_loss(job.loss, job.head)))
    names = ("seed", "head", "loss", "train", "clusters", "compat")
    neighbors = {"used": job.neighbors.used} | search_settings(job.neighbors)
    return {name: values[name] for name in names} | {"neighbors": neighbors}


def _fit(job: TrainJob, run: RunDirectory, mined: Mined, lease: Lease, *, key: str) -> str:
    """Run the workers; return the folder of the last checkpoint, which holds the model.

    Each start has a folder of its own below the training's: Ray Train can't go on in a folder whose
    record a kill cut short, so what to resume from is found by looking at the checkpoints.
    """
    starts_uri = _starts_uri(run, key)
    reached = find_checkpoint(starts_uri)
    while reached is None or not fs.exists(fs.join(reached, "model.json")):
        lease.check()
        before = reached
        try:
            retried(lambda: _run_workers(job, run, mined, lease, key=key))
        except _StoreAwayError as error:
            raise ClusterError(f"training failed: {error}") from error
        except ray.train.TrainingFailedError as error:
            cause, reached = _cause(error), find_checkpoint(starts_uri)
            # Spot nodes may be lost more often than that, as long as work is done in between.
            if not isinstance(cause, ClusterError) or reached == before:
                raise cause from error
            logger.warning("%s; going on from %s", cause, reached)
            continue
        reached = find_checkpoint(starts_uri)
        if reached == before:
            raise ClusterError("training ended without a model; see events.jsonl")
    lease.check()
    for start in fs.list_names(starts_uri):
        if not reached.startswith(fs.join(starts_uri, start, "")):
            fs.delete(fs.join(starts_uri, start))
    return reached


class _StoreAwayError(OSError):
    """Ray Train's controller, which looks at the store once when it starts, could not."""


def _run_workers(job: TrainJob, run: RunDirectory, mined: Mined, lease: Lease, *, key: str) -> None:
    """Run the workers to the end.

    Raises:
        _StoreAwayError: if the workers were not started for it.
    """
    try:
        with follow(run, job.train.steps, lease):
            _trainer(job, run, mined, key=key).fit()
    except ray.exceptions.ActorDiedError as error:
        kind = "OSError: "
        lines = [line for line in str(error).splitlines() if line.startswith(kind)]
        if not lines:
            raise
        raise _StoreAwayError(lines[-1].removeprefix(kind)) from error


def _starts_uri(run: RunDirectory, key: str) -> str:
    # The name holds the fingerprint: a run of other settings never continues this one.
    return run.path("checkpoints", f"train-{key}")


def _trainer(job: TrainJob, run: RunDirectory, mined: Mined, *, key: str) -> TorchTrainer:
    """Return what runs the workers, in a start of its own."""
    starts_uri = _starts_uri(run, key)
    start = f"start-{len(fs.list_names(starts_uri)):03d}"
    actors = plan_actors(job.workers, at_least=job.min_workers)
    stream = None if mined.is_stored else plan_stream(actors.count)
    if stream is not None:
        actors = stream.worker
    # Ray Train counts workers by what they reserve, and those that stream reserve fractions.
    is_elastic = job.min_workers is not None and stream is None
    filesystem, path = fs.open_uri(starts_uri)
    resources = {"GPU": actors.num_gpus} if actors.num_gpus else {"CPU": max(actors.num_cpus, 0.01)}
    return TorchTrainer(
        _worker,
        train_loop_config={
            "job": job,
            "mined": mined,
            "run_uri": run.uri,
            "candidates_uri": run.path("candidates", key),
            "device": actors.device,
            "starts_uri": starts_uri,
        },
        torch_config=TorchConfig(backend=actors.collectives, timeout_s=_COLLECTIVE_S),
        scaling_config=ScalingConfig(
            num_workers=(job.min_workers, job.workers) if is_elastic else actors.count,
            elastic_resize_monitor_interval_s=_RESIZE_S,
            use_gpu=bool(actors.num_gpus),
            resources_per_worker=resources,
            # What reserves little, beside a stream or on small nodes, would be put on one node.
            placement_strategy="PACK" if actors.num_gpus and stream is None else "SPREAD",
        ),
        run_config=RunConfig(
            name=start,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=_WORKER_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=_KEPT_CHECKPOINTS),
        ),
    )


def _cause(error: Exception) -> StegoError:
    """Return the workers' own error if it is one of ours, else a cluster error of one line."""
    failures = getattr(error, "worker_failures", {}) or {}
    for failure in failures.values():
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, StegoError):
            return cause
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return ClusterError(f"training failed: {lines[-1] if lines else type(error).__name__}")


def _worker(config: dict[str, Any]) -> None:
    """Train on one worker; ordinary PyTorch apart from the context."""
    job: TrainJob = config["job"]
    mined: Mined = config["mined"]
    # More threads would add in another order: the model must not depend on the machine (ADR 34).
    torch.set_num_threads(1)
    if job.debug:  # which is when the lines of workers are passed on
        log.setup(debug=True)
    context = RayContext(config["run_uri"], starts_uri=config["starts_uri"])
    device = config["device"]
    folder = context.resume_folder()
    if folder is not None and fs.exists(fs.join(folder, "model.json")):
        return  # a worker died after the last report, and Ray Train started all of them again
    views = read_views(mined.store_uri, mined.manifest.num_units)
    with _features(config, views) as features:
        data = training_data(job, mined, views, context, features=features, device=device)
        job = with_cluster_count(job, data, context, device=device)
        card = trained_card(job, mined, views, data)
        candidates = Candidates(config["candidates_uri"], job, data, card, context)
        model = train(job, data, context, device=device, visit=candidates.visitor)

        def save(folder: str) -> None:  # on rank 0, which fits while the others wait
            save_segmenter(folder, *(passed or candidates.choose(model)))

        passed: Fitted | None = None
        if job.clusters.passes:
            start = from_first_worker(lambda: candidates.choose(model))
            passed = refined(job, start, data, context, device=device)
        context.checkpoint(job.train.steps + 1, save)


@contextmanager
def _features(config: dict[str, Any], views: Views) -> Iterator[FeatureSource]:
    """Give the features of all views: those that are stored, else a stream of this worker's."""
    job, mined = config["job"], config["mined"]
    if mined.is_stored:
        yield local_features(job, mined, views, device=config["device"])
        return
    # Planned here: since the driver did, the cluster may have lost a node.
    plan = plan_stream(ray.train.get_context().get_world_size())
    settings = stream_settings(job, mined, views)
    with StreamedFeatures(settings, plan, steps=job.train.steps, debug=job.debug) as features:
        yield features

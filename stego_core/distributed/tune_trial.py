"""One trial of a study, in a worker of Ray Tune: train, fit, judge, leave a record.

What a trial leaves is below `trials/` of the study: `<key>.json` when it has ended, the model in
`<key>/`, and while it runs its checkpoints in `<key>/state/`. These, not Ray Tune's own files, are
what a study continues from: they survive whatever happens to the driver.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from ray import tune
from ray.tune.callback import Callback

from stego_core.config.load import fingerprint
from stego_core.config.schema import DataConfig, TrainJob
from stego_core.config.trials import Trial, mining_key
from stego_core.distributed.labelled import LabelledStore
from stego_core.distributed.mine import Mined
from stego_core.distributed.selection import Candidates, feature_channels, judge, refined
from stego_core.distributed.training_data import local_features, trained_card, training_data
from stego_core.errors import StegoError
from stego_core.inference.scoring import head_on_features
from stego_core.metrics.scores import score_clusters, scored_classes
from stego_core.model.segmenter import save_segmenter
from stego_core.storage import fs
from stego_core.storage.feature_store import read_views
from stego_core.storage.run import RunDirectory
from stego_core.training.choose import with_cluster_count
from stego_core.training.fit import fit
from stego_core.training.loop import train
from stego_core.training.optional import needs_labels
from stego_core.training.state import find_checkpoint

logger = logging.getLogger(__name__)

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
_RUNGS = "rungs.json"  # beside the state of a trial: what it reached so far
# At a rung the clusters only have to tell trials apart.
_RUNG_RESTARTS, _RUNG_SAMPLE = 2, 10_000


@dataclass(frozen=True, slots=True)
class Study:
    """What all trials share.

    Attributes:
        uri: of the study.
        trials: by key.
        mined: of each trial's mining, by key of the trial.
        labelled: what each trial is scored on, by key of the trial; without labels absent.
        data: which classes are scored.
        num_named: classes of the labelled split's `classes.txt`.
        criterion: that trials are compared by.
        rungs: steps at which they are.
        seed: of the study: criteria look at the same views in every trial.
        device: of torch.
    """

    uri: str
    trials: dict[str, Trial]
    mined: dict[str, Mined]
    labelled: dict[str, LabelledStore]
    data: DataConfig
    num_named: int
    criterion: str
    rungs: tuple[int, ...]
    seed: int
    device: str

    def label_key(self, trial_key: str) -> str | None:
        """Return the fingerprint of what a trial is scored on, None without labels."""
        store = self.labelled.get(trial_key)
        if store is None:
            return None
        return fingerprint(store.key, self.num_named) if self.num_named else store.key


def trial_uri(study_uri: str, key: str, *parts: str) -> str:
    """Return where a trial keeps its model and, while it runs, its state."""
    return fs.join(study_uri, "trials", key, *parts)


def end_trial(study_uri: str, record: dict[str, Any]) -> None:
    """Say that a trial has ended, and how; it will not be run again."""
    text = json.dumps(record, indent=2) + "\n"
    fs.write_bytes(fs.join(study_uri, "trials", f"{record['key']}.json"), text.encode())
    for name in ("state", _RUNGS):
        fs.delete(trial_uri(study_uri, record["key"], name))


class _Context:
    """The training loop's view of a trial (see `TrainContext`)."""

    rank, num_workers = 0, 1

    def __init__(self, state_uri: str) -> None:
        self._uri = state_uri

    def resume_folder(self) -> str | None:
        """Return the newest checkpoint that is whole."""
        return find_checkpoint(self._uri)

    def reached(self) -> int:
        """Return the steps of the newest checkpoint: rungs before it can't be judged any more."""
        folder = self.resume_folder()
        return 0 if folder is None else int(folder.rsplit("step-", 1)[1])

    def checkpoint(self, step: int, save: Callable[[str], None]) -> None:
        """Keep this checkpoint and the one before it: a kill may leave the newest half written."""
        start = fs.join(self._uri, "start")
        earlier = fs.list_names(start)
        save(fs.join(start, f"step-{step:08d}"))
        for name in earlier[:-1]:
            fs.delete(fs.join(start, name))

    def event(self, name: str, **values: Any) -> None:
        """Drop the event: a study has no curves of single trainings."""


def run_trial(config: dict[str, Any], *, study: Study) -> None:
    """Run one trial and leave its record; the trainable of Ray Tune.

    An error of ours (a setting that can't work, a training that diverged) ends the trial for good
    and becomes its record. Any other is Ray Tune's to repeat.
    Records travel as JSON: Ray Tune takes nested results apart.
    """
    trial = study.trials[config["trial"]]
    torch.set_num_threads(1)  # sums in another order would make results depend on the machine
    started_s = time.monotonic()
    record: dict[str, Any] = {
        "key": trial.key,
        "seed": trial.seed,
        "values": trial.values,
        "features": study.mined[trial.key].key,
        "labels": study.label_key(trial.key),
        "status": FINISHED,
        "steps": trial.job.train.steps,
        "rungs": [],
        "criteria": {},
        "scores": {},
        "error": None,
    }
    try:
        _run(study, trial, record, started_s)
    except StegoError as error:
        record |= {"status": FAILED, "error": str(error).splitlines()[0]}
    record["seconds"] = round(time.monotonic() - started_s, 2)
    end_trial(study.uri, record)
    tune.report({"record": json.dumps(record)})


def _run(study: Study, trial: Trial, record: dict[str, Any], started_s: float) -> None:
    mined = study.mined[trial.key]
    # Neighbours are read from where they were mined; only the studies with labels see any.
    job = replace(trial.job, out=mining_uri(study.uri, trial.job))
    if not needs_labels(job.loss):
        mined = replace(mined, dataset=replace(mined.dataset, labels_uri=None))
    views = read_views(mined.store_uri, mined.manifest.num_units)
    context = _Context(trial_uri(study.uri, trial.key, "state"))
    # Without a store each trial has a backbone of its own: actors beside many trials would have no
    # place (docs/adr/0026).
    features = local_features(job, mined, views, device=study.device)
    data = training_data(job, mined, views, context, features=features, device=study.device)
    job = with_cluster_count(job, data, context, device=study.device)
    card = trained_card(job, mined, views, data)
    candidates = Candidates(trial_uri(study.uri, trial.key, "candidates"), job, data, card, context)
    reached, rungs_uri = context.reached(), trial_uri(study.uri, trial.key, _RUNGS)
    # Of a process that died: the checkpoint goes on behind them.
    passed = json.loads(fs.read_if_exists(rungs_uri) or b"[]") if reached else []
    record["rungs"] = [rung for rung in passed if rung[0] < reached]
    for step in (rung for rung in study.rungs if reached <= rung < job.train.steps):
        until = _until(job, step)
        model = train(until, data, context, device=study.device, visit=candidates.visitor)
        rough = replace(
            job.clusters,
            restarts=min(_RUNG_RESTARTS, job.clusters.restarts),
            sample=min(_RUNG_SAMPLE, job.clusters.sample),
        )
        tensors = fit(replace(job, clusters=rough), model, data)
        value = judge(tensors, card, data, seed=study.seed)[study.criterion]
        record["rungs"].append([step, value])
        fs.write_bytes(rungs_uri, json.dumps(record["rungs"]).encode())
        seconds = round(time.monotonic() - started_s, 2)
        stopped = record | {"status": STOPPED, "steps": step, "seconds": seconds}
        tune.report({"rung": step, "value": value, "record": json.dumps(stopped)})
    model = train(job, data, context, device=study.device, visit=candidates.visitor)
    tensors, card = candidates.choose(model)
    if job.clusters.passes:
        tensors, card = refined(job, (tensors, card), data, context, device=study.device)
    save_segmenter(trial_uri(study.uri, trial.key, "model"), tensors, card)
    record["criteria"] = judge(tensors, card, data, seed=study.seed)
    if trial.key in study.labelled:
        head = head_on_features(tensors, card, feature_channels(data))
        counts = study.labelled[trial.key].confusion(head)
        if counts.any():  # else no image has a label that can be read
            classes = scored_classes(study.data, counts, num_named=study.num_named)
            found = score_clusters(counts, classes=classes)
            record["scores"] = {"miou": round(found.miou, 4), "accuracy": round(found.accuracy, 4)}


class TrialCounter(Callback):  # type: ignore[misc]
    """Tells of each trial that ends."""

    def __init__(self, run: RunDirectory, total: int) -> None:
        self._run, self._total, self._done = run, total, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log the trial and add it to the events."""
        self._done += 1
        record = json.loads((trial.last_result or {}).get("record", "{}"))
        status, found = record.get("status"), record.get("criteria", {}) | record.get("scores", {})
        self._run.event("tune/trial", trial=record.get("key"), status=status, **found)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
        logger.info(
            "trial %d/%d  %s  %.0f s  %s",
            self._done,
            self._total,
            status,
            record.get("seconds", 0.0),
            shown or record.get("error") or "",
        )


def mining_uri(study_uri: str, job: TrainJob) -> str:
    """Return the run directory of the mining that a trial of a study needs."""
    return fs.join(study_uri, "mined", mining_key(job))


def _until(job: TrainJob, step: int) -> TrainJob:
    """Return a training that ends at a step; the draws of its steps are those of the whole one."""
    return replace(job, train=replace(job.train, steps=step))

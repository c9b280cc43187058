"""Studies on Ray Tune: each feature is computed once, then all trials are trained."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ray import tune

from stego_core.config.load import dump_toml
from stego_core.config.schema import DataConfig, PredictConfig, TuneJob
from stego_core.config.space import Axis
from stego_core.config.trials import Trial, make_trials, mining_key
from stego_core.datasets.demo import DEMO
from stego_core.datasets.directory import Dataset, open_dataset
from stego_core.distributed.cluster import connect, plan_actors
from stego_core.distributed.data import check_data, plan_check, select_images
from stego_core.distributed.labelled import LabelledStore, store_labelled
from stego_core.distributed.mine import Mined, find_images, mine, plan_mine
from stego_core.distributed.mine_record import drop_stores
from stego_core.distributed.rungs import Ladder, RungScheduler
from stego_core.distributed.tune_trial import (
    FINISHED,
    Study,
    TrialCounter,
    end_trial,
    mining_uri,
    run_trial,
    trial_uri,
)
from stego_core.errors import ClusterError, InputError
from stego_core.metrics.study import (
    StudyResult,
    best_trial,
    importance_table,
    summarize,
    trials_table,
)
from stego_core.model.checkpoint import load_tensors
from stego_core.model.segmenter import save_segmenter
from stego_core.storage import fs
from stego_core.storage.lease import Lease, hold
from stego_core.storage.parquet import table_bytes
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)

_STORES = "features"  # of all minings of a study
_TRIAL_FAILURES = 2  # of a worker that dies; an error of ours is a result
# Where nothing has been measured yet: a trial on two cores of a CPU (docs/sensitivity.md).
_STEP_S, _TRIAL_S = 0.09, 15.0


def plan_tune(job: TuneJob) -> list[str]:
    """Return what a run would do, one line each, without touching anything."""
    axes, trials = make_trials(job)
    records = _records(job, trials)
    left = [trial for trial in trials if trial.key not in records]
    settings = len({trial.setting for trial in trials})
    minings = {mining_key(trial.job) for trial in trials}
    labelled = _labelled(job)
    seconds = _estimate(left, list(records.values())) / job.tune.parallel
    measured = "from the trials done" if records else "a guess for two CPUs"
    return [
        *plan_mine(
            replace(job, out=mining_uri(job.out, trials[0].job)), shared=fs.join(job.out, _STORES)
        ),
        *(f"varies: {axis.path}: {_shown(axis, job)}" for axis in axes),
        f"trials: {len(trials)} of {settings} settings, {len(records)} done, "
        f"{job.tune.parallel} at a time",
        f"minings: {len(minings)}",
        f"scored on: {labelled[0].labels_uri if labelled else 'nothing, there are no labels'}",
        *(plan_check(_scored(job), *labelled, job.limits) if labelled else []),
        f"time: about {max(1, round(seconds / 60)) if left else 0} min ({measured}), "
        "without mining",
    ]


def tune_study(job: TuneJob, run: RunDirectory) -> None:
    """Run the trials that have no record yet, then write tables, report and the best model.

    Raises:
        ConfigError: if the space can't be used.
        InputError: if there are no images.
        CheckpointError: if another job writes to the study.
        ClusterError: if trials died, or none could be finished; the tables are there.
    """
    axes, trials = make_trials(job)
    source = find_images(job)
    labelled = _labelled(job)
    with hold(job.out) as lease:
        if labelled is not None:
            check_data(run, _scored(job), *labelled, job.limits)
        fs.write_bytes(run.path("config.resolved.toml"), dump_toml(job).encode())
        with connect(debug=job.debug):
            study = _prepare(job, run, trials, source, labelled, lease)
            records = _current(_records(job, trials), study)
            left = [trial for trial in trials if trial.key not in records]
            logger.info("study: %d trials, %d of them done", len(trials), len(records))
            run.count(total=len(trials), done=len(records))
            run.status("running", stage="tune")
            if left:
                _run_trials(job, run, study, left, list(records.values()))
        lease.check()
        records = _current(_records(job, trials), study)
        run.count(total=len(trials), done=len(records))
        result = summarize(trials, axes, records, job.tune.criterion)
        _write(job, run, trials, result)
    if not any(record["status"] == FINISHED for record in records.values()):
        reasons = [str(record["error"]) for record in records.values() if record["error"]]
        raise ClusterError(f"no trial has finished; {(reasons or ['see --debug'])[0]}")
    if lost := len(trials) - len(records):
        raise ClusterError(f"{lost} of {len(trials)} trials died; give the command again for them")


def _labelled(job: TuneJob) -> tuple[Dataset, Sequence[fs.ListedFile]] | None:
    """Return the split that trials are scored on; None where it has no labels."""
    if job.data.root == DEMO:
        return None
    try:
        dataset = open_dataset(job.data.root, job.tune.split)
    except InputError:
        return None
    if dataset.labels_uri is None:
        return None
    return dataset, select_images(_scored(job), dataset)


def _scored(job: TuneJob) -> DataConfig:
    # `fraction` and `limit` make training smaller, not the split that scores are of.
    return replace(job.data, fraction=1.0, limit=None)


def _prepare(
    job: TuneJob,
    run: RunDirectory,
    trials: list[Trial],
    source: tuple[Dataset, Sequence[fs.ListedFile]],
    labelled: tuple[Dataset, Sequence[fs.ListedFile]] | None,
    lease: Lease,
) -> Study:
    """Mine and store whatever the trials need, each thing once."""
    features = fs.join(job.out, _STORES)
    mined: dict[str, Mined] = {}
    stores: dict[tuple[str, PredictConfig], LabelledStore] = {}
    for trial in trials:
        key = mining_key(trial.job)
        if key not in mined:
            run.status("running", stage="mine")
            at = RunDirectory(mining_uri(job.out, trial.job), job="tune")
            training = replace(trial.job, out=at.uri, workers=job.workers)
            images = source if trial.job.data == job.data else find_images(trial.job)
            retried = {one.store_uri for one in mined.values()}
            mined[key] = mine(training, at, images, lease, shared=features, retried=retried)
        if labelled is not None and (key, trial.predict) not in stores:
            run.status("running", stage="labels")
            alike = replace(trial.job, backbone=mined[key].backbone)
            stores[key, trial.predict] = store_labelled(
                replace(job, predict=trial.predict),
                alike,
                labelled,
                weights_sha256=mined[key].weights.sha256,
            )
    drop_stores(features, keep={one.store_uri.rpartition("/")[2] for one in mined.values()})
    actors = plan_actors(job.tune.parallel)
    return Study(
        uri=job.out,
        trials={trial.key: trial for trial in trials},
        mined={trial.key: mined[mining_key(trial.job)] for trial in trials},
        labelled={t.key: stores[mining_key(t.job), t.predict] for t in trials} if labelled else {},
        data=job.data,
        num_named=len(labelled[0].class_names) if labelled else 0,
        criterion=job.tune.criterion,
        rungs=tuple(sorted(set(job.tune.rungs))),
        seed=job.seed,
        device=actors.device,
    )


def _records(job: TuneJob, trials: list[Trial]) -> dict[str, dict[str, Any]]:
    """Return the records of trials that have ended, by key."""
    names = {*fs.list_names(fs.join(job.out, "trials"))}
    return {
        trial.key: json.loads(fs.read_bytes(fs.join(job.out, "trials", f"{trial.key}.json")))
        for trial in trials
        if f"{trial.key}.json" in names
    }


def _current(records: dict[str, dict[str, Any]], study: Study) -> dict[str, dict[str, Any]]:
    """Leave out records of trials whose images, weights or labels have changed since."""
    return {
        k: r
        for k, r in records.items()
        if (r["features"], r.get("labels")) == (study.mined[k].key, study.label_key(k))
    }


def _run_trials(
    job: TuneJob,
    run: RunDirectory,
    study: Study,
    left: list[Trial],
    earlier: list[dict[str, Any]],
) -> None:
    actors = plan_actors(job.tune.parallel)
    resources = {"GPU": 1} if actors.num_gpus else {"CPU": max(actors.num_cpus, 0.01)}
    ladder = Ladder(job.tune.keep)
    for record in earlier:
        for rung, value in record["rungs"]:
            ladder.add(rung, record["key"], value)
    if not job.debug:  # Ray's tables and hints; what matters is logged here
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    trainable = tune.with_parameters(run_trial, study=study)
    # Ray Tune's own folder is of this run alone: what a study continues from are our records.
    filesystem, path = fs.open_uri(run.path("ray-tune"))
    fs.delete(run.path("ray-tune"))
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={"trial": tune.grid_search([trial.key for trial in left])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=job.tune.parallel,
            scheduler=RungScheduler(ladder, partial(end_trial, study.uri)),
            reuse_actors=True,  # a process needs seconds to load torch
        ),
        run_config=tune.RunConfig(
            name="study",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=_TRIAL_FAILURES),
            callbacks=[TrialCounter(run, len(left))],
        ),
    )
    try:
        tuner.fit()
    except tune.TuneError as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        raise ClusterError(f"Ray Tune failed: {lines[-1] if lines else error}") from error
    fs.delete(run.path("ray-tune"))


def _write(job: TuneJob, run: RunDirectory, trials: list[Trial], result: StudyResult) -> None:
    for name, table in (
        ("trials.parquet", trials_table(result)),
        ("importance.parquet", importance_table(result)),
    ):
        fs.write_bytes(run.path(name), table_bytes(table))
    best = best_trial(result, job.tune.criterion)
    if best is not None:
        tensors, card = load_tensors(trial_uri(job.out, best["trial"], "model"), "model")
        save_segmenter(run.path("model"), tensors, card)
        (chosen,) = (trial for trial in trials if trial.key == best["trial"])
        # A training of its own: `train.py --config best.toml --out ...` makes the same model.
        fs.write_bytes(run.path("best.toml"), dump_toml(chosen.job).encode())
        logger.info(
            "best by %s: %s in %s", job.tune.criterion, best["trial"], run.path("best.toml")
        )
    try:
        from stego_core.viz.study import write_study

        logger.info("report: %s", write_study(run.path("report"), result, job.tune.criterion))
    except Exception as error:  # whatever goes wrong in drawing, the study is done
        logger.warning("the report can't be drawn (%s); the tables are complete", error)
        run.event("tune/report-failed", error=str(error))


def _estimate(left: list[Trial], done: list[dict[str, Any]]) -> float:
    """Return the seconds that trials will take one after the other."""
    finished = [record for record in done if record["status"] == FINISHED]
    if finished:
        return float(len(left) * sum(r["seconds"] for r in finished) / len(finished))
    return float(sum(_TRIAL_S + _STEP_S * trial.job.train.steps for trial in left))


def _shown(axis: Axis, job: TuneJob) -> str:
    if axis.is_range:
        low, high = axis.values
        return f"{low:g} to {high:g}" + (" (logarithmic)" if axis.is_log else "")
    return ", ".join(str(value) for value in axis.grid(job.tune.points))

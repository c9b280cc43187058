"""From a study's settings to its trials: one training each, with a key that never changes."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from stego_core.config.load import fingerprint, to_dict, validate
from stego_core.config.method import settled_loss
from stego_core.config.neighbors import search_settings
from stego_core.config.schema import PredictConfig, TrainJob, TuneJob
from stego_core.config.space import Axis, nest, read_space, study_settings
from stego_core.errors import ConfigError

ONE_AT_A_TIME, RANDOM, GRID = "one-at-a-time", "random", "grid"
_STREAM = 7  # of the random sampler, beside those of training
_GRID_LIMIT = 10_000
# How a trial is run, not what it computes.
_PASSING = ("out", "workers", "min_workers", "max_failed", "retry", "dry_run", "debug")


@dataclass(frozen=True, slots=True)
class Trial:
    """One training of a study.

    Attributes:
        values: what differs from the job, by dotted path; every axis has a value.
        seed: of the training.
        samplers: which samplers made it.
        job: the training; its `out` is the study's.
        predict: how images become label maps when the training is scored.
        key: fingerprint of everything that determines the result but the data's content.
    """

    values: dict[str, Any]
    seed: int
    samplers: tuple[str, ...]
    job: TrainJob
    predict: PredictConfig
    key: str

    @property
    def setting(self) -> str:
        """Return what trials that differ in their seed alone have in common."""
        return fingerprint(self.values)


def make_trials(job: TuneJob) -> tuple[list[Axis], list[Trial]]:
    """Return the axes of a study and its trials, in the order in which they run.

    All seeds of a setting follow each other, and samplers come in the order they are named. The
    list depends on the settings alone: a study that is resumed makes the same one.

    Raises:
        ConfigError: one line for each problem of the space and of the settings that it makes.
    """
    axes, problems = read_space(job.space, study_settings())
    if not axes and not problems:
        problems = ["space: nothing varies; give a table [space] in a --config file"]
    if job.clusters.count == 0 and "clusters.count" not in {axis.path for axis in axes}:
        problems.append(
            "clusters.count = 0: trials that each chose a number of clusters could not be "
            "compared; give one"
        )
    if problems:
        raise ConfigError(*problems)
    start = to_dict(_training(job) | {"predict": job.predict})
    settings: dict[str, tuple[dict[str, Any], list[str]]] = {}
    # In one order, however they are named: the job's own setting comes first.
    for sampler in (name for name in _SAMPLERS if name in job.tune.sampler):
        for values in _SAMPLERS[sampler](job, axes, start):
            _, samplers = settings.setdefault(fingerprint(values), (values, []))
            if sampler not in samplers:
                samplers.append(sampler)
    trials: list[Trial] = []
    wrong: dict[str, None] = {}
    for values, samplers in settings.values():
        try:
            trials += _seeded(job, start, values, tuple(samplers))
        except ConfigError as error:
            wrong |= dict.fromkeys(error.problems)
    if wrong:
        raise ConfigError(*wrong)
    return axes, trials


def mining_key(job: TrainJob) -> str:
    """Return a fingerprint of the settings that determine features and neighbours.

    Trials with the same key share one run directory of `mine_neighbors`. It may be too fine, never
    too coarse: what is mined is checked against the data's content as well.
    """
    switches = to_dict(job.compat)
    names = ("nearest_images", "jpeg_crops", "mining_dropout", "skip_first_neighbor")
    return fingerprint(
        to_dict(job.data),
        to_dict(job.backbone),
        to_dict(job.views),
        job.limits.record(),
        to_dict(job.store),
        search_settings(job.neighbors),
        {name: switches[name] for name in names},
        job.seed if job.compat.mining_dropout or job.neighbors.method != "exact" else None,
    )


def _seeded(
    job: TuneJob, start: dict[str, Any], values: dict[str, Any], samplers: tuple[str, ...]
) -> list[Trial]:
    made = []
    seeds = job.tune.draw_seeds if samplers == (RANDOM,) else job.tune.seeds
    for number in range(seeds):
        tree = _laid_over(start, nest(values)) | {"seed": job.seed + number}
        checked = validate(TuneJob, tree)
        training = TrainJob(**_training(checked))
        settled = to_dict(replace(training, loss=settled_loss(training.loss, training.head)))
        record = {k: v for k, v in settled.items() if k not in _PASSING}
        scored = {"predict": to_dict(checked.predict), "split": job.tune.split}
        stops = [list(job.tune.rungs), job.tune.keep, job.tune.criterion] if job.tune.rungs else []
        key = fingerprint(record, scored, stops)
        seed = job.seed + number
        made.append(Trial(values, seed, samplers, training, checked.predict, key))
    return made


def _training(job: TuneJob) -> dict[str, Any]:
    """Return the settings of a study's trainings."""
    return {part.name: getattr(job, part.name) for part in fields(TrainJob)}


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        is_table = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _laid_over(below[key], value) if is_table else value
    return merged


def _base_values(axes: list[Axis], start: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for axis in axes:
        node: Any = start
        for name in axis.path.split("."):
            node = node[name]
        values[axis.path] = tuple(node) if isinstance(node, list) else node
    return values


def _one_at_a_time(job: TuneJob, axes: list[Axis], start: dict[str, Any]) -> list[dict[str, Any]]:
    base = _base_values(axes, start)
    around = [base | {axis.path: value} for axis in axes for value in axis.grid(job.tune.points)]
    return [base, *around]


def _random(job: TuneJob, axes: list[Axis], start: dict[str, Any]) -> list[dict[str, Any]]:
    # Each setting has draws of its own: adding another one, or more samples, changes none of them.
    columns = {}
    for axis in axes:
        stream = int.from_bytes(hashlib.sha256(axis.path.encode()).digest()[:8], "big")
        generator = np.random.default_rng([job.seed, _STREAM, stream])
        columns[axis.path] = [axis.draw(generator) for _ in range(job.tune.samples)]
    return [
        {path: column[number] for path, column in columns.items()}
        for number in range(job.tune.samples)
    ]


def _grid(job: TuneJob, axes: list[Axis], start: dict[str, Any]) -> list[dict[str, Any]]:
    choices = [axis.grid(job.tune.points) for axis in axes]
    size = int(np.prod([len(values) for values in choices]))
    if size > _GRID_LIMIT:
        raise ConfigError(
            f"tune.sampler = grid: {size} combinations; name fewer values, or take random"
        )
    paths = [axis.path for axis in axes]
    return [dict(zip(paths, values, strict=True)) for values in itertools.product(*choices)]


_SAMPLERS = {ONE_AT_A_TIME: _one_at_a_time, RANDOM: _random, GRID: _grid}

"""The tables of a study: one row for each trial, curves, importances, and how criteria did."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from stego_core.config.space import Axis
from stego_core.config.trials import ONE_AT_A_TIME, Trial
from stego_core.metrics.criterion import CRITERIA, rank_correlation
from stego_core.metrics.importance import Importance, pair_shares, rank_settings, seed_noise

SCORES = ("miou", "accuracy")
MISSING = "missing"
_OWN = ("trial", "setting", "seed", "samplers", "status", "steps", "seconds", "error")


@dataclass(frozen=True, slots=True)
class Curve:
    """How a score follows one setting, the others as in the job.

    Attributes:
        path: the setting.
        values: what it took, numbers in order.
        means: mean score over seeds of each value.
        deviations: standard deviation over seeds; NaN with one.
        base: position of the job's own value.
    """

    path: str
    values: tuple[Any, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    base: int


@dataclass(frozen=True, slots=True)
class StudyResult:
    """What is known of a study.

    Attributes:
        rows: of `trials.parquet`, one for each trial.
        paths: the settings that vary.
        target: which score curves and importances are of: `miou` with labels, else the criterion.
        curves: of trials made one at a time.
        importances: the largest share first; of drawn settings where there are any.
        pairs: interaction share of each pair of settings.
        noise: standard deviation over seeds.
        correlations: Spearman's of each criterion with each score, over all finished trials.
        by_setting: the same over settings, each the mean of its seeds.
        choices: for each criterion, the score of the setting that it likes best.
    """

    rows: list[dict[str, Any]]
    paths: list[str]
    target: str
    curves: list[Curve]
    importances: list[Importance]
    pairs: dict[tuple[str, str], float]
    noise: float
    correlations: dict[str, dict[str, float]]
    by_setting: dict[str, dict[str, float]]
    choices: dict[str, float]


def summarize(
    trials: Sequence[Trial],
    axes: Sequence[Axis],
    records: dict[str, dict[str, Any]],
    criterion: str,
) -> StudyResult:
    """Return what a study found, as far as it has come.

    Args:
        trials: of the study.
        axes: what varies.
        records: of the trials that have ended, by key.
        criterion: stands in for mIoU where nothing is labelled.
    """
    rows = [_row(trial, records.get(trial.key)) for trial in trials]
    paths = [axis.path for axis in axes]
    has_scores = any(not math.isnan(row["miou"]) for row in rows)
    target = "miou" if has_scores else criterion
    # Trials around one point say little of the space: drawn ones are preferred where there are any.
    known = [row for row in rows if not math.isnan(row[target])]
    drawn = [row for row in known if row["samplers"] != ONE_AT_A_TIME]
    settings = _means(drawn or known)
    columns = {path: [row[path] for row in settings] for path in paths}
    scores = [row[target] for row in settings]
    finished = [row for row in rows if row["status"] == "finished"]
    return StudyResult(
        rows=rows,
        paths=paths,
        target=target,
        curves=_curves(rows, paths, target),
        importances=rank_settings(columns, scores),
        pairs=pair_shares(columns, scores),
        noise=seed_noise([row["setting"] for row in rows], [row[target] for row in rows]),
        correlations=_correlations(finished),
        by_setting=_correlations(_means(finished)),
        choices=_choices(_means(finished)),
    )


def trials_table(result: StudyResult) -> pa.Table:
    """Return `trials.parquet`: a column for each setting, criterion and score, no nested types."""
    columns: dict[str, pa.Array] = {}
    for name in (*_OWN, *result.paths, *CRITERIA, *SCORES):
        values = [row[name] for row in result.rows]
        numbers = name in (*CRITERIA, *SCORES, "seconds")
        columns[name] = pa.array(
            [None if isinstance(v, float) and math.isnan(v) else v for v in values],
            pa.float64() if numbers else _arrow_type(values),
        )
    return pa.table(columns).replace_schema_metadata({"stego.schema": "trials/1"})


def importance_table(result: StudyResult) -> pa.Table:
    """Return `importance.parquet`: settings and pairs of them, each ranked by its share."""
    rows: list[dict[str, Any]] = [
        {"kind": "setting", "rank": rank, "target": result.target, **asdict(one)}
        for rank, one in enumerate(result.importances, 1)
    ]
    ordered = sorted(result.pairs.items(), key=lambda pair: -np.nan_to_num(pair[1]))
    rows += [
        {"kind": "pair", "rank": rank, "target": result.target, "path": " x ".join(pair)}
        | {"share": share}
        for rank, (pair, share) in enumerate(ordered, 1)
    ]
    schema = pa.schema(
        [
            ("kind", pa.string()),
            ("rank", pa.int32()),
            ("target", pa.string()),
            ("path", pa.string()),
            ("share", pa.float64()),
            ("raw_share", pa.float64()),
            ("effect", pa.float64()),
            ("best", pa.string()),
            ("settings", pa.int32()),
        ],
        metadata={"stego.schema": "importance/1"},
    )
    clean = [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in rows
    ]
    return pa.Table.from_pylist(clean, schema)


def best_trial(result: StudyResult, criterion: str) -> dict[str, Any] | None:
    """Return the row of the best trial: of the setting with the best mean, the best seed.

    Labels have no part in it. None if no trial has finished.
    """
    finished = [row for row in result.rows if not math.isnan(row[criterion])]
    if not finished:
        return None
    means = {row["setting"]: row[criterion] for row in _means(finished)}
    return max(finished, key=lambda row: (means[row["setting"]], row[criterion]))


def _row(trial: Trial, record: dict[str, Any] | None) -> dict[str, Any]:
    record = record or {"status": MISSING}
    found = {**record.get("criteria", {}), **record.get("scores", {})}
    return {
        "trial": trial.key,
        "setting": trial.setting,
        "seed": trial.seed,
        "samplers": " ".join(trial.samplers),
        "status": record["status"],
        "steps": record.get("steps"),
        "seconds": record.get("seconds", math.nan),
        "error": record.get("error"),
        **{path: _plain(value) for path, value in trial.values.items()},
        **{name: found.get(name, math.nan) for name in (*CRITERIA, *SCORES)},
    }


def _plain(value: Any) -> Hashable:
    return json.dumps(value) if isinstance(value, list | tuple) else value


def _arrow_type(values: list[Any]) -> pa.DataType:
    kinds = {type(value) for value in values if value is not None}
    for kind, found in ((bool, pa.bool_()), (int, pa.int64()), (str, pa.string())):
        if kinds <= {kind}:
            return found
    return pa.float64() if kinds <= {int, float} else pa.string()


def _means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each setting, its numbers the means over the seeds that have them."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["setting"], []).append(row)
    return [
        group[0] | {name: _mean([row[name] for row in group]) for name in (*CRITERIA, *SCORES)}
        for group in groups.values()
    ]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _curves(rows: list[dict[str, Any]], paths: list[str], target: str) -> list[Curve]:
    around = [row for row in rows if ONE_AT_A_TIME in row["samplers"].split()]
    if not around:
        return []
    base = around[0]  # the first trial that this sampler makes is the job itself
    curves = []
    for path in paths:
        others = [name for name in paths if name != path]
        here = [row for row in around if all(row[name] == base[name] for name in others)]
        values = list(dict.fromkeys(row[path] for row in here))
        if all(isinstance(value, int | float) for value in values):
            values.sort()
        scores = [[r[target] for r in here if r[path] == v] for v in values]
        known = [[score for score in group if not math.isnan(score)] for group in scores]
        curves.append(
            Curve(
                path=path,
                values=tuple(values),
                means=tuple(_mean(group) for group in known),
                deviations=tuple(
                    float(np.std(g, ddof=1)) if len(g) > 1 else math.nan for g in known
                ),
                base=values.index(base[path]),
            )
        )
    return curves


def _correlations(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        criterion: {
            score: rank_correlation([r[criterion] for r in rows], [r[score] for r in rows])
            for score in SCORES
        }
        for criterion in CRITERIA
    }


def _choices(settings: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the mIoU of each criterion's favourite, and best, median and worst beside them."""
    scored = [row for row in settings if not math.isnan(row["miou"])]
    if not scored:
        return {}
    mious = [row["miou"] for row in scored]
    chosen = {name: max(scored, key=lambda row: row[name])["miou"] for name in CRITERIA}
    ends = {"best": max(mious), "median": float(np.median(mious)), "worst": min(mious)}
    return chosen | ends

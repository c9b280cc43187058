"""How much of a score's variation over a study follows from each setting, and from pairs of them.

The share of a setting is the correlation ratio: variance of the mean score of each of its values,
over the variance of the score. Groups of few trials differ by chance; that expectation is taken off
(epsilon squared), so a setting without influence has a share of about 0, as often below as above.
Trials that differ in their seed alone are averaged first, so that they don't count as evidence of
their own; what they differ by is reported as noise.

Source: Pearson 1905 (correlation ratio); Kelley 1935 (epsilon squared).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_GROUPS = 4  # a range is cut into as many groups of equal size
_MANY = 6  # numbers with more different values than this are cut into groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """One setting's part in the variation of a score."""

    path: str
    share: float
    """Epsilon squared, at most 1; about 0 (also below it) without influence, NaN if unknown."""
    raw_share: float
    """Correlation ratio (eta squared) in [0, 1], which chance makes too large."""
    effect: float
    """Largest mean score of a group less the smallest, in units of the score."""
    best: str
    """The group with the largest mean."""
    settings: int
    """How many settings of the study it was measured on."""


def rank_settings(
    columns: Mapping[str, Sequence[Hashable]], scores: Sequence[float]
) -> list[Importance]:
    """Return the importance of each setting, the largest share first.

    Args:
        columns: value of every setting in each of n settings of the study, by path.
        scores: n scores, means over seeds; NaNs are left out.
    """
    kept = [row for row, score in enumerate(scores) if not math.isnan(score)]
    score = np.array([scores[row] for row in kept])
    found = []
    for path, column in columns.items():
        names, groups = group_values([column[row] for row in kept])
        raw, share = _shares(groups, score)
        means = [float(score[groups == number].mean()) for number in range(len(names))]
        top = int(np.argmax(means)) if means else 0
        found.append(
            Importance(
                path=path,
                share=share,
                raw_share=raw,
                effect=max(means) - min(means) if means else math.nan,
                best=names[top] if names else "",
                settings=len(kept),
            )
        )
    return sorted(found, key=lambda one: -math.inf if math.isnan(one.share) else one.share)[::-1]


def pair_shares(
    columns: Mapping[str, Sequence[Hashable]], scores: Sequence[float]
) -> dict[tuple[str, str], float]:
    """Return how much each pair of settings explains beyond the two alone.

    It is epsilon squared of the cells of both less that of each, at least 0: 0 where effects add
    up, NaN where no cell has more than one member. With few trials it is rough.

    Args:
        columns: as for `rank_settings`.
        scores: as for `rank_settings`.
    """
    kept = [row for row, score in enumerate(scores) if not math.isnan(score)]
    score = np.array([scores[row] for row in kept])
    groups = {
        path: group_values([column[row] for row in kept])[1] for path, column in columns.items()
    }
    found = {}
    for first, second in itertools.combinations(columns, 2):
        cells = groups[first] * (int(groups[second].max(initial=0)) + 1) + groups[second]
        cells = np.unique(cells, return_inverse=True)[1]
        both = _shares(cells, score)[1]
        alone = [max(0.0, _shares(groups[path], score)[1]) for path in (first, second)]
        found[first, second] = both if math.isnan(both) else max(0.0, both - sum(alone))
    return found


def seed_noise(settings: Sequence[Hashable], scores: Sequence[float]) -> float:
    """Return the standard deviation over seeds of one setting, pooled over all; NaN if unknown.

    Args:
        settings: what each trial's setting is called; trials of one name differ in their seed.
        scores: of the trials; NaNs are left out.
    """
    by_setting: dict[Hashable, list[float]] = {}
    for setting, score in zip(settings, scores, strict=True):
        if not math.isnan(score):
            by_setting.setdefault(setting, []).append(score)
    groups = [np.array(one) for one in by_setting.values() if len(one) > 1]
    freedom = sum(len(one) - 1 for one in groups)
    if not freedom:
        return math.nan
    return math.sqrt(sum(float(np.square(one - one.mean()).sum()) for one in groups) / freedom)


def group_values(values: Sequence[Hashable]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return names of groups and the group of each value.

    Equal values are a group; many different numbers are cut into a few runs of equal size.
    """
    distinct = list(dict.fromkeys(values))
    numbers = [v for v in distinct if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(distinct):
        distinct.sort(key=lambda value: float(value))  # type: ignore[arg-type]
        if len(distinct) > _MANY:
            return _cut(np.array(values, np.float64))
    position = {value: number for number, value in enumerate(distinct)}
    return [str(value) for value in distinct], np.array([position[v] for v in values], np.int64)


def _cut(values: npt.NDArray[np.float64]) -> tuple[list[str], npt.NDArray[np.int64]]:
    # Equal values stay together: a group is a run of ranks of the distinct values' first places.
    first_place = np.searchsorted(np.sort(values), values)
    raw = first_place * _GROUPS // len(values)
    groups = np.unique(raw, return_inverse=True)[1].astype(np.int64)
    names = []
    for number in range(int(groups.max()) + 1):
        inside = values[groups == number]
        names.append(f"{inside.min():g} to {inside.max():g}")
    return names, groups


def _shares(groups: npt.NDArray[np.int64], score: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return eta squared and epsilon squared; NaN where there is nothing to compare."""
    count, num_groups = len(score), len(np.unique(groups))
    total = float(np.square(score - score.mean()).sum()) if count else 0.0
    if not total or num_groups < 2:
        return math.nan, math.nan
    sizes = np.bincount(groups)
    means = np.bincount(groups, score) / sizes
    within = float(np.square(score - means[groups]).sum())
    raw = 1 - within / total
    if count <= num_groups:
        return raw, math.nan
    return raw, 1 - (within / (count - num_groups)) / (total / (count - 1))

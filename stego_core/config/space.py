"""The space of a study: a table of dotted paths and the values that each setting takes.

In TOML, under `[space]`, a list of values or a range:

    loss.samples = [5, 11, 20]
    train.head_lr = {low = 1e-4, high = 1e-2, log = true}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from stego_core.config.diagnose import flatten, read_table, show
from stego_core.config.schema import TuneJob

if TYPE_CHECKING:
    import numpy as np

# What a study can't vary: where things lie, how they run, and the data it is a study of. Scores
# are of the best cluster of each pixel, which no sharpness of probabilities changes.
_FIXED = (
    *("out", "workers", "min_workers", "dry_run", "debug", "max_failed", "retry", "overwrite"),
    *("data.root", "data.split"),
    *("predict.batch", "predict.alpha", "predict.shard_batches", "predict.unit_images"),
)
_OWN = {"seed": "seeds are given by tune.seeds"}
_RANGE_KEYS = {"low", "high", "log"}


@dataclass(frozen=True, slots=True)
class Axis:
    """One setting that varies.

    Attributes:
        path: dotted, as the flags have it.
        values: what it takes; of a range its two ends.
        is_range: whether anything between the two values is possible.
        is_log: whether a range is even in the logarithm.
        is_integer: whether values of a range are rounded.
    """

    path: str
    values: tuple[Any, ...]
    is_range: bool = False
    is_log: bool = False
    is_integer: bool = False

    def grid(self, points: int) -> tuple[Any, ...]:
        """Return the values to visit in order: all of a list, `points` of a range."""
        if not self.is_range:
            return self.values
        visited = [self._at(step / (points - 1)) for step in range(points)]
        return tuple(dict.fromkeys(visited))

    def draw(self, generator: np.random.Generator) -> Any:
        """Return a random value: of a list each alike, of a range even (in the logarithm)."""
        if not self.is_range:
            return self.values[int(generator.integers(len(self.values)))]
        return self._at(float(generator.random()))

    def _at(self, share: float) -> Any:
        low, high = self.values
        if self.is_log:
            value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        else:
            value = low + share * (high - low)
        # Six digits are finer than any setting needs, and can be read in a table.
        return round(value) if self.is_integer else float(f"{value:.6g}")


def study_settings() -> dict[str, Any]:
    """Return what a study may name in its space: dotted path to annotation (see `flatten`)."""
    return {
        path: annotation
        for path, annotation in flatten(TuneJob).items()
        if path.partition(".")[0] not in ("tune", "space")
    }


def read_space(
    space: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[list[Axis], list[str]]:
    """Read a space against the settings that a study may name.

    Args:
        space: nested tables or quoted dotted keys, as TOML gives them.
        settings: of `study_settings`.

    Returns:
        The axes that are right, in the table's order, and one line for each problem.
    """
    axes: list[Axis] = []
    problems: list[str] = []
    for path, value in _entries(space, settings):
        axis, wrong = _read_axis(path, value, settings)
        problems += wrong
        if axis is not None and not wrong:
            axes.append(axis)
    return axes, problems


def space_problems(space: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return one line for each problem of a space (see `read_space`)."""
    return read_space(space, settings)[1]


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted paths as nested tables.

    >>> nest({"loss.samples": 5, "seed": 1})
    {'loss': {'samples': 5}, 'seed': 1}
    """
    tables: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split(".")
        table = tables
        for parent in parents:
            table = table.setdefault(parent, {})
        table[name] = value
    return tables


def _entries(
    table: Mapping[str, Any], settings: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        path = f"{prefix}{key}"
        # A table is a range where a setting stands, else it holds settings.
        is_inner = isinstance(value, Mapping) and dataclasses.is_dataclass(settings.get(path))
        if is_inner and not _RANGE_KEYS & {*value}:
            yield from _entries(value, settings, f"{path}.")
        else:
            yield path, value


def _read_axis(path: str, value: Any, settings: Mapping[str, Any]) -> tuple[Axis | None, list[str]]:
    where = f"space.{path} = {show(value)}"
    if path in _FIXED or path in _OWN:
        return None, [f"{where}: {_OWN.get(path, 'a study keeps this setting')}"]
    if dataclasses.is_dataclass(settings.get(path)):
        return None, [f"{where}: is a table, name a setting in it"]
    if path not in settings:
        return None, read_table(nest({path: value}), settings, " in [space]")[1]
    if isinstance(value, Mapping):
        return _read_range(path, value, settings, where)
    if not isinstance(value, list | tuple) or not value:
        return None, [f"{where}: give a list of values, or {{low = ..., high = ...}}"]
    found, problems = _checked(path, value, settings)
    if len({show(one) for one in found}) < len(found):
        problems.append(f"{where}: a value stands there twice")
    return Axis(path, tuple(found)), problems


def _read_range(
    path: str, value: Mapping[str, Any], settings: Mapping[str, Any], where: str
) -> tuple[Axis | None, list[str]]:
    kind = _number(settings[path])
    if kind is None:
        return None, [f"{where}: only numbers have ranges, give a list of values"]
    log = value.get("log", False)
    if not {"low", "high"} <= {*value} <= _RANGE_KEYS or not isinstance(log, bool):
        return None, [f"{where}: a range has low, high and, if it is even in the logarithm, log"]
    ends, problems = _checked(path, [value["low"], value["high"]], settings)
    if problems:
        return None, problems
    if not ends[0] < ends[1]:
        return None, [f"{where}: low must be less than high"]
    if log and ends[0] <= 0:
        return None, [f"{where}: a logarithmic range starts above 0"]
    axis = Axis(path, tuple(ends), is_range=True, is_log=log, is_integer=kind is int)
    return axis, []


def _checked(path: str, values: Any, settings: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    """Return values as the schema reads them, and one line for each that it refuses."""
    found: list[Any] = []
    problems: list[str] = []
    for value in values:
        read, wrong = read_table(nest({path: value}), settings, " in [space]")
        problems += wrong
        found += read.values()
    return found, problems


def _number(annotation: Any) -> type | None:
    """Return int or float where an annotation is one with or without a range, else None."""
    inner = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    for kind in (int, float):
        if inner is kind or kind in get_args(inner):
            return kind
    optional = [_number(part) for part in get_args(inner) if get_origin(part) is Annotated]
    return next((kind for kind in optional if kind), None)

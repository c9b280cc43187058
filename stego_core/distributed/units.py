"""A streaming Ray Data plan over work units: fetch (CPU tasks) → work (actors) → finish (tasks).

One row of the plan is one work unit; its images travel as one Arrow buffer. So it never matters how
Ray cuts rows into blocks: every unit has the same images in the same order, whatever the number of
actors and however often a job is resumed (docs/adr/0003).
"""

from __future__ import annotations

import gc
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError

from stego_core.distributed.cluster import ActorPlan, plan_actors
from stego_core.distributed.deaths import start_ledger
from stego_core.distributed.guard import Guard, Probe
from stego_core.distributed.packed import (
    UnitError,
    Worker,
    pack_result,
    raise_if_failed,
    unpack,
)
from stego_core.errors import ClusterError

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

MAX_BLOCKS = 20_000
ATTEMPTS = 5
_LONG_S = 3600.0  # an attempt that lasted so long is no sign of a failure that comes at once again
UNIT_RETRIES = 4  # of a unit whose process died; Ray Data would go on for ever
_NO_PROGRESS_S = 900.0  # longer than any unit, and than a store that is away
# Ray Data gives a plan up and leaves an actor that hangs with its CPUs: it must have ended before.
_UNIT_S = 840.0
# Of tasks beside actors, which leave little more than a CPU of a small node: if a task of each kind
# did not fit, Ray Data would finish nothing before everything is read.
_SMALL_CPUS = 0.5
_AT_A_TIME = 2  # units in work in an actor, which share its threads (see `map_threads`)
_IN_FLIGHT = 3  # units per actor: those in work, and one that is ready
_making = threading.Lock()  # the first two units begin together


@dataclass(frozen=True, slots=True)
class Stage:
    """A function of (unit, table) → table and the keyword arguments it is called with.

    Attributes:
        function: of the stage.
        kwargs: of the function.
        probe: of the same form, computes as the function does and writes nothing: with it the
            pictures are found at which the stage's process dies. None leaves them unfound.
    """

    function: Callable[..., Any]
    kwargs: dict[str, Any]
    probe: Callable[..., Any] | None = None


def map_threads(
    function: Callable[[_Item], _Result], items: Sequence[_Item], threads: int
) -> list[_Result]:
    """Return the function of each item, several at a time, each computed by one thread alone.

    torch's own threads cut a sum in other places when their number changes. Here a batch is always
    computed by a single thread, so results have the same bytes however many threads an actor has.
    Calls at the same time share the threads: the next unit's items fill those that the last items
    of a unit leave idle.
    """
    with _making:
        pool = _pool(threads)
    return list(pool.map(function, items))


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    import torch  # only actors compute: the tasks that read and write do without its memory

    torch.set_num_threads(1)
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def units_at_once(actors: ActorPlan) -> int:
    """Return how many units are in work at a time, in all actors together."""
    return _AT_A_TIME * actors.count


def _fetch(row: pa.Table, *, stage: Stage, ledger: Any) -> pa.Table:
    unit = row["unit"][0].as_py()
    name = f"fetch {unit}"
    deaths = ray.get(ledger.begin.remote(name))
    result = pack_result(unit, lambda: stage.function(unit, deaths=deaths, **stage.kwargs))
    ledger.end.remote(name)
    return result


class _GuardedWorker(Worker):
    """The actor of a plan of units."""

    def __init__(self, stage: Stage, guard: Guard) -> None:
        super().__init__(stage.function, stage.kwargs)
        self._guard = guard

    def __call__(self, row: pa.Table) -> pa.Table:
        return self._guard.run(row, self.run)


def _finish(row: pa.Table, *, stage: Stage, guard: Guard) -> pa.Table:
    return guard.run(row, lambda unit, table: stage.function(unit, table, **stage.kwargs))


def _factory_probe(stage: Stage) -> Probe | None:
    """Return how a child computes a unit as the actor does."""
    probe, kwargs = stage.probe, stage.kwargs
    if probe is None:
        return None
    return lambda unit: lambda: partial(probe(**kwargs), unit)


def _function_probe(stage: Stage) -> Probe | None:
    """Return how a child computes a unit as the task does."""
    probe, kwargs = stage.probe, stage.kwargs
    if probe is None:
        return None
    return lambda unit: lambda: partial(probe, unit, **kwargs)


def run_units(
    pending: Callable[[], Sequence[int]],
    *,
    fetch: Stage,
    work: Stage,
    finish: Stage,
    actors: ActorPlan,
    seconds: float,
    debug: bool = False,
) -> Iterator[dict[str, Any]]:
    """Run the units that are pending; yield the receipt of each as it is done.

    A unit that was done is never pending again, so after a failure of the engine (a node died, an
    actor ran out of memory) only the rest is run again.

    Args:
        pending: which units are left, asked before each attempt.
        fetch: unit → table of inputs; a CPU task. Its keyword argument `deaths` says how often
            the unit was begun by a process that did not live to end it.
        work: a factory; called with its keyword arguments in each actor, it returns a function of
            unit and table.
        finish: unit and table → a table with the one column `receipt`, JSON; a CPU task.
        actors: number and size of the actors.
        seconds: that one picture may take where culprits are looked for.
        debug: show Ray's progress.

    Raises:
        StegoError: as a stage raised it.
        ClusterError: if an attempt ends in another error without any unit done, or `ATTEMPTS` end
            in one within an hour each.
    """
    configure(debug=debug)
    ledger, stages = start_ledger(), (fetch, work, finish)
    attempt = short = 0
    while short < ATTEMPTS and (units := list(pending())):
        attempt, short, done = attempt + 1, short + 1, 0
        began = time.monotonic()
        plan = _planned(actors, attempt)
        try:
            for receipt in _streams(units, ledger, stages, plan, seconds):
                done += 1
                yield receipt
        except (RayError, ExecutionTimeoutError, SystemError, UnitError) as error:
            short = short if time.monotonic() - began < _LONG_S else 0
            if not done or short == ATTEMPTS:
                reason = last_line(error)
                raise ClusterError(f"Ray failed {attempt} time(s), last: {reason}") from error
            logger.warning("Ray failed after %d units; going on: %s", done, last_line(error))
            time.sleep(min(2**short, 30))
        # The error's frames hold the failed plan, whose actors hold CPUs until it is collected.
        gc.collect()


def _planned(actors: ActorPlan, attempt: int) -> ActorPlan:
    """Return the plan of the first attempt, later one that fits the nodes that are left."""
    if attempt == 1 or actors.num_gpus:
        return actors
    try:
        return replace(actors, num_cpus=plan_actors(actors.count).num_cpus)
    except ClusterError:
        return actors  # all nodes are gone, and may come back


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text, or its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def configure(*, debug: bool) -> None:
    """Set how plans run that this process makes from now on.

    Args:
        debug: show Ray's progress.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = debug
    context.print_on_execution_start = debug
    context.execution_options.preserve_order = False
    # As many units wait for an actor as it has in work and at hand: decoding is quicker than any
    # backbone, and what it is ahead lies in memory.
    context.downstream_capacity_backpressure_ratio = 1.0
    # Ray's own helper actors may be lost with their node, and then it waits, half an hour as it is.
    context.execution_no_progress_timeout_s = _NO_PROGRESS_S
    if not debug:
        logging.getLogger("ray.data").setLevel(logging.ERROR)


def _streams(units: list[int], *rest: Any) -> Iterator[dict[str, Any]]:
    # More units than blocks would share blocks, and be held in memory and lost together.
    for start in range(0, len(units), MAX_BLOCKS):
        yield from _stream(units[start : start + MAX_BLOCKS], *rest)


def _stream(
    units: list[int],
    ledger: Any,
    stages: tuple[Stage, Stage, Stage],
    actors: ActorPlan,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    fetch, work, finish = stages
    is_bounded = not actors.num_gpus
    working = Guard(ledger, "work", _factory_probe(work), seconds, is_bounded, _UNIT_S)
    finishing = Guard(ledger, "finish", _function_probe(finish), seconds, unit_s=_UNIT_S)
    data = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
    one_unit: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    data = data.map_batches(
        _fetch,
        fn_kwargs={"stage": fetch, "ledger": ledger},
        num_cpus=1 if actors.num_gpus else _SMALL_CPUS,
        max_retries=UNIT_RETRIES,
        **one_unit,
    )
    data = data.map_batches(
        _GuardedWorker,
        fn_constructor_kwargs={"stage": work, "guard": working},
        compute=ActorPoolStrategy(
            size=min(actors.count, len(units)),
            max_tasks_in_flight_per_actor=_IN_FLIGHT,
            max_concurrent_calls_per_actor=_AT_A_TIME,
            enable_true_multi_threading=True,
        ),
        num_cpus=actors.num_cpus,
        num_gpus=actors.num_gpus or None,
        max_task_retries=UNIT_RETRIES,
        **one_unit,
    )
    data = data.map_batches(
        _finish,
        fn_kwargs={"stage": finish, "guard": finishing},
        num_cpus=_SMALL_CPUS,
        max_retries=UNIT_RETRIES,
        **one_unit,
    )
    for batch in data.iter_batches(batch_size=None, batch_format="pyarrow"):
        for index in range(batch.num_rows):
            _, table = unpack(batch.slice(index, 1))
            raise_if_failed(table)
            yield json.loads(table["receipt"][0].as_py())


def receipt_table(**fields: Any) -> pa.Table:
    """Return what a finish stage returns: one JSON receipt."""
    return pa.table({"receipt": [json.dumps(fields)]})

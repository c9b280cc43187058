"""A unit in one stage: its begin and end in the ledger, and a search for culprits after a death."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import ray

from stego_core.distributed.culprits import Compute, NotThePictures, Search
from stego_core.distributed.isolate import TimeLimit
from stego_core.distributed.packed import (
    UnitError,
    is_failure,
    pack_result,
    raise_if_failed,
    unpack,
)
from stego_core.doctor.machine import available_memory
from stego_core.errors import ClusterError, StegoError

logger = logging.getLogger(__name__)

Probe = Callable[[int], Callable[[], Compute]]
"""Unit → what starts, in a child process, the computation of a stage without its writes."""

_ALWAYS_BYTES = 2**30  # of memory, however little is left
# One at a time in an actor: each child has a model of its own.
_searching = threading.Lock()
_making = threading.Lock()  # the first two units begin together


@dataclass(frozen=True, slots=True)
class Guard:
    """Runs units through a stage on a worker.

    Attributes:
        ledger: handle of the `DeathLedger`.
        stage: its name there.
        probe: what a child computes; None where there is no search for culprits.
        seconds: that one picture may take in the child.
        is_bounded: whether the child's memory is; that of a process with a GPU can't be told.
        unit_s: after which a process is ended in which no unit has begun or ended.
    """

    ledger: Any
    stage: str
    probe: Probe | None
    seconds: float
    is_bounded: bool = True
    unit_s: float = 3600.0

    def run(self, row: pa.Table, compute: Callable[[int, pa.Table], pa.Table]) -> pa.Table:
        """Return the packed result of a packed unit, or of an error the error.

        A unit that an earlier process began and did not end is searched for culprits first, one
        that fails in a way of which a picture may be the cause afterwards, and computed again.
        """
        unit, table = unpack(row)
        if is_failure(table):
            return row
        name = f"{self.stage} {unit}"
        deaths = ray.get(self.ledger.begin.remote(name))
        if deaths:
            table = self._without_culprits(unit, table, deaths)
        result = self._computed(unit, table, compute)
        if not deaths and _may_be_a_pictures_fault(result):
            rest = self._without_culprits(unit, table, 1)
            if rest is not table:
                result = self._computed(unit, rest, compute)
        self.ledger.end.remote(name)
        return result

    def _computed(
        self, unit: int, table: pa.Table, compute: Callable[[int, pa.Table], pa.Table]
    ) -> pa.Table:
        with _making:
            limit = _time_limit(self.unit_s)
        with limit.running():
            return pack_result(unit, lambda: compute(unit, table))

    def _without_culprits(self, unit: int, table: pa.Table, deaths: int) -> pa.Table:
        if self.probe is None:
            return table
        memory = partial(_memory, deaths) if self.is_bounded else lambda: None
        with _searching:
            search = Search(self.probe(unit), seconds=self.seconds, memory=memory)
            try:
                return search.set_aside(table)
            except (NotThePictures, ClusterError) as error:
                # The unit may be whole all the same: it is computed as if nobody had looked.
                logger.warning("no search for culprits in unit %d: %s", unit, error)
                return table
            finally:
                search.close()


@lru_cache(maxsize=1)
def _time_limit(seconds: float) -> TimeLimit:
    return TimeLimit(seconds)  # one for all units of a process


def _may_be_a_pictures_fault(result: pa.Table) -> bool:
    try:
        raise_if_failed(unpack(result)[1])
    except UnitError:
        return True
    except (StegoError, OSError):
        return False
    return False


def _memory(deaths: int) -> int | None:
    left = available_memory()
    return None if left is None else max(_ALWAYS_BYTES, left // (1 + deaths))

"""When a unit is searched for culprits, and with what."""

from __future__ import annotations

import pyarrow as pa
import pytest

from stego_core.distributed import guard
from stego_core.distributed.culprits import NotThePictures
from stego_core.distributed.guard import Guard
from stego_core.distributed.packed import UnitError, pack, pack_result, raise_if_failed, unpack
from stego_core.errors import ClusterError, ConfigError

TABLE = pa.table({"status": ["ok", "ok"], "detail": pa.nulls(2, pa.string())})
WITHOUT = pa.table({"status": ["ok", "crashed"], "detail": ["", "why"]})


class Ledger:
    """A `DeathLedger` without Ray, and handles of its methods."""

    def __init__(self, deaths=0):
        self.deaths, self.ended = deaths, []

    begin = property(lambda self: self)
    end = property(lambda self: End(self.ended))

    def remote(self, name):
        return self.deaths


class End:
    def __init__(self, ended):
        self.remote = ended.append


class Searched:
    """A search that finds the second picture; remembers how it was made."""

    def __init__(self, monkeypatch, error=None):
        self.memory, self.closed, self.error = [], 0, error
        monkeypatch.setattr(guard, "Search", self)
        monkeypatch.setattr(guard.ray, "get", lambda value: value)

    def __call__(self, start, *, seconds, memory):
        self.memory.append(memory())
        return self

    def set_aside(self, table):
        if self.error:
            raise self.error
        return WITHOUT

    def close(self):
        self.closed += 1


def run(ledger, compute, **options):
    settings = {"probe": lambda unit: lambda: None, "seconds": 1.0} | options
    result = Guard(ledger, "work", **settings).run(pack(3, TABLE), compute)
    assert ledger.ended == ["work 3"]
    return unpack(result)[1]


def fails_with_the_second(unit, table):
    if table["status"].to_pylist() == ["ok", "ok"]:
        raise RuntimeError("at one of these")
    return table


def test_a_unit_that_nothing_happened_to_is_not_searched(monkeypatch):
    searched = Searched(monkeypatch)
    assert run(Ledger(), lambda unit, table: table) == TABLE
    assert not searched.memory


def test_a_unit_that_a_dead_process_had_begun_is_searched_first(monkeypatch):
    searched = Searched(monkeypatch)
    assert run(Ledger(deaths=1), lambda unit, table: table) == WITHOUT
    assert searched.closed == 1


def test_a_unit_that_raises_is_searched_and_computed_again_at_once(monkeypatch):
    searched = Searched(monkeypatch)
    assert run(Ledger(), fails_with_the_second) == WITHOUT
    assert searched.closed == 1


def test_our_own_errors_are_no_pictures_fault(monkeypatch):
    searched = Searched(monkeypatch)

    def refuse(unit, table):
        raise ConfigError("said once")

    with pytest.raises(ConfigError, match="said once"):
        raise_if_failed(run(Ledger(), refuse))
    assert not searched.memory


@pytest.mark.parametrize("error", [NotThePictures("black"), ClusterError("no child")])
def test_without_a_verdict_the_unit_is_computed_as_it_is(error, monkeypatch):
    searched = Searched(monkeypatch, error)
    assert run(Ledger(deaths=1), lambda unit, table: table) == TABLE
    with pytest.raises(UnitError, match="at one of these"):
        raise_if_failed(run(Ledger(), fails_with_the_second))
    assert searched.closed == 2


def test_a_stage_without_a_probe_is_never_searched(monkeypatch):
    searched = Searched(monkeypatch)
    assert run(Ledger(deaths=3), lambda unit, table: table, probe=None) == TABLE
    assert not searched.memory


@pytest.mark.parametrize(
    ("left", "deaths", "share"),
    [(12 * 2**30, 1, 6 * 2**30), (12 * 2**30, 2, 4 * 2**30), (2**20, 1, 2**30), (None, 1, None)],
)
def test_a_child_gets_a_share_of_the_memory_that_is_left(left, deaths, share, monkeypatch):
    monkeypatch.setattr(guard, "available_memory", lambda: left)
    searched = Searched(monkeypatch)
    run(Ledger(deaths), lambda unit, table: table)
    run(Ledger(deaths), lambda unit, table: table, is_bounded=False)
    assert searched.memory == [share, None]


def test_what_a_store_refused_on_a_worker_is_refused_on_the_driver():
    def refused():
        raise PermissionError("ACCESS_DENIED")  # without a number, as a store says it

    with pytest.raises(PermissionError, match="ACCESS_DENIED"):
        raise_if_failed(unpack(pack_result(3, refused))[1])

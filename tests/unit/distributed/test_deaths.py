"""What a task of several units knows of its earlier lives."""

from __future__ import annotations

import pytest

from stego_core.distributed.deaths import DeathLedger


@pytest.mark.parametrize("killers", [1, 3, 5])
def test_each_killer_of_a_task_kills_it_once(killers: int) -> None:
    ledger, units = DeathLedger(), [f"fetch {number}" for number in range(8)]

    def live() -> bool:
        """Do the task from its first unit on; tell whether it came to its end."""
        for number, unit in enumerate(units):
            deaths = ledger.begin(unit)
            if number < killers and not deaths:
                return False
            ledger.end(unit)
        return True

    lives = next(life for life in range(1, 100) if live())
    assert lives == killers + 1


def test_a_unit_that_ended_has_no_deaths() -> None:
    ledger = DeathLedger()
    for _ in range(3):
        assert ledger.begin("work 1") == 0
        ledger.end("work 1")


def test_a_ledger_that_was_restarted_counts_no_lives_too_many() -> None:
    ledger = DeathLedger()
    ledger.end("work 1")  # begun in its earlier life
    assert ledger.begin("work 1") == 0
    assert ledger.begin("work 1") == 1

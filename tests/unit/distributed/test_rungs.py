"""Which trials go on at a rung, and what the scheduler tells Ray Tune."""

import json

from ray.tune.schedulers import TrialScheduler

from stego_core.distributed.rungs import Ladder, RungScheduler


def test_the_first_trial_goes_on_and_later_ones_must_be_among_the_best():
    ladder = Ladder(0.5)
    assert ladder.add(10, "a", 0.5)
    assert ladder.add(10, "b", 0.9)
    assert not ladder.add(10, "c", 0.4)  # third of three, two of which go on
    assert ladder.add(10, "d", 0.6)  # second of four
    assert not ladder.add(10, "e", 0.45)  # fourth of five, three of which go on


def test_a_trial_that_is_repeated_counts_once():
    ladder = Ladder(0.5)
    for _ in range(3):
        ladder.add(10, "a", 0.3)
    assert ladder.add(10, "b", 0.5)
    assert ladder.add(10, "c", 0.6)
    assert not ladder.add(10, "d", 0.4)  # third of four; of six it would go on


def test_rungs_do_not_see_each_other():
    ladder = Ladder(0.1)
    assert ladder.add(10, "f", 0.9)
    assert ladder.add(20, "g", 0.1)
    assert not ladder.add(10, "h", 0.8)


def test_a_trial_that_ends_at_a_rung_has_its_record_written_before_it_does():
    ended = []
    scheduler = RungScheduler(Ladder(0.1), ended.append)

    def report(value):
        record = {"key": f"trial of {value}", "value": value}
        result = {"rung": 10, "value": value, "record": json.dumps(record)}
        return scheduler.on_trial_result(None, None, result)

    assert report(0.9) == TrialScheduler.CONTINUE
    assert ended == []
    assert report(0.8) == TrialScheduler.STOP
    assert ended == [{"key": "trial of 0.8", "value": 0.8}]
    final = {"record": "{}"}
    assert scheduler.on_trial_result(None, None, final) == TrialScheduler.CONTINUE

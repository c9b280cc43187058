"""Importance of settings where it was planted."""

import itertools
import math

import numpy as np
import pytest

from stego_core.metrics.importance import group_values, pair_shares, rank_settings, seed_noise


def planted(count=400, noise=0.1, seed=0):
    """A score that follows `strong` much, `weak` a little, `a` and `b` only together."""
    generator = np.random.default_rng(seed)
    columns = {name: generator.integers(0, 3, count) for name in ("idle", "weak", "strong")}
    columns |= {name: generator.integers(0, 2, count) for name in ("a", "b")}
    score = 3.0 * columns["strong"] + 0.6 * columns["weak"] + 2.0 * (columns["a"] ^ columns["b"])
    score = score + noise * generator.normal(size=count)
    return {name: column.tolist() for name, column in columns.items()}, score.tolist()


def test_settings_are_ranked_by_what_they_do_and_an_idle_one_has_no_share():
    columns, scores = planted()
    ranked = rank_settings(columns, scores)
    assert [one.path for one in ranked[:2]] == ["strong", "weak"]
    strong, weak = ranked[:2]
    # Variances: 9 * 2/3 = 6, 0.36 * 2/3 = 0.24, 4 * 1/4 = 1; the rest is noise of 0.01.
    assert strong.share == pytest.approx(6 / 7.25, abs=0.05)
    assert weak.share == pytest.approx(0.24 / 7.25, abs=0.03)
    assert strong.effect == pytest.approx(6, abs=0.4)
    assert strong.best == "2"
    idle = next(one for one in ranked if one.path == "idle")
    assert abs(idle.share) < 0.02


def test_an_interaction_without_main_effects_is_found_in_its_pair_only():
    columns, scores = planted()
    pairs = pair_shares(columns, scores)
    assert pairs["a", "b"] == pytest.approx(1 / 7.25, abs=0.05)
    others = [share for pair, share in pairs.items() if pair != ("a", "b")]
    assert len(others) == 9
    assert max(others) < 0.05


def test_chance_is_taken_off_where_trials_are_few():
    generator = np.random.default_rng(3)
    raw, corrected = [], []
    for _ in range(200):
        column = np.arange(12) % 4
        (one,) = rank_settings({"idle": column.tolist()}, generator.normal(size=12).tolist())
        raw.append(one.raw_share)
        corrected.append(one.share)
    assert np.mean(raw) == pytest.approx(
        3 / 11, abs=0.05
    )  # what chance gives four groups of twelve
    assert np.mean(corrected) == pytest.approx(0, abs=0.05)


def test_missing_scores_are_left_out_and_nothing_to_compare_is_unknown():
    (one,) = rank_settings({"x": [1, 1, 2, 2, 2]}, [1.0, 1.2, 3.0, 3.2, math.nan])
    assert one.settings == 4
    assert one.share > 0.9
    for columns, scores in (({"x": [1, 1]}, [1.0, 2.0]), ({"x": []}, []), ({"x": [1]}, [math.nan])):
        (unknown,) = rank_settings(columns, scores)
        assert math.isnan(unknown.share)
    assert math.isnan(pair_shares({"x": [1, 2], "y": [1, 2]}, [1.0, 2.0])["x", "y"])


def test_many_numbers_become_runs_of_equal_size_in_their_order():
    values = [0.1 * number for number in range(20)]
    names, groups = group_values(values)
    assert groups.tolist() == list(itertools.chain.from_iterable([k] * 5 for k in range(4)))
    assert names[0] == "0 to 0.4"
    names, groups = group_values([True, False, True])
    assert names == ["True", "False"]
    assert groups.tolist() == [0, 1, 0]
    assert group_values([10, 9, 9])[0] == ["9", "10"]


def test_seed_noise_is_the_deviation_inside_settings():
    generator = np.random.default_rng(0)
    settings = [number // 2 for number in range(2000)]
    scores = [10 * one + 0.5 * generator.normal() for one in settings]
    assert seed_noise(settings, scores) == pytest.approx(0.5, abs=0.03)
    assert math.isnan(seed_noise([1, 2, 3], [1.0, 2.0, 3.0]))

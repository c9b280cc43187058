"""The tables of a study, from records as trials leave them."""

import math

import pytest

from stego_core.config.load import validate
from stego_core.config.schema import TuneJob
from stego_core.config.trials import make_trials
from stego_core.metrics.study import best_trial, importance_table, summarize, trials_table

SPACE = {"head.dim": [16, 64], "backbone.blocks": [[-1], [-2, -1]], "loss.self.shift": [0.1, 0.2]}


def finished(samplers=("one-at-a-time",), labelled=True, samples=12):
    """A study whose mIoU follows head.dim, and whose agreement follows mIoU exactly."""
    tune = {"sampler": list(samplers), "samples": samples}
    axes, trials = make_trials(
        validate(TuneJob, {"space": SPACE, "tune": tune, "clusters": {"count": 5}})
    )
    records = {}
    for trial in trials:
        miou = 20 + 0.1 * trial.values["head.dim"] + 0.01 * trial.seed
        records[trial.key] = {
            "status": "finished",
            "steps": 30,
            "seconds": 2.0,
            "criteria": {"agreement": miou / 100, "stability": -miou, "margin": 0.5},
            "scores": {"miou": miou, "accuracy": 50.0} if labelled else {},
            "error": None,
        }
    return axes, trials, records


def summarized(*args, **kwargs):
    axes, trials, records = finished(*args, **kwargs)
    return summarize(trials, axes, records, "agreement")


def test_every_trial_is_a_row_also_one_that_has_not_ended():
    axes, trials, records = finished()
    del records[trials[2].key]
    records[trials[1].key] = {"status": "failed", "error": "diverged"}
    result = summarize(trials, axes, records, "agreement")
    table = trials_table(result)
    assert table.num_rows == len(trials) == 12
    assert table["status"].to_pylist()[:3] == ["finished", "failed", "missing"]
    assert table["miou"].to_pylist()[1:3] == [None, None]
    assert table["error"][1].as_py() == "diverged"
    assert str(table.schema.field("head.dim").type) == "int64"
    assert str(table.schema.field("loss.self.shift").type) == "double"
    assert {*table["backbone.blocks"].to_pylist()} == {"[-3, -2, -1]", "[-1]", "[-2, -1]"}


def test_criteria_are_correlated_with_scores_over_trials_and_settings():
    result = summarized(("random",), samples=12)
    assert result.correlations["agreement"]["miou"] == pytest.approx(1)
    assert result.correlations["stability"]["miou"] == pytest.approx(-1)
    assert math.isnan(result.correlations["margin"]["miou"])  # it never varies
    assert result.choices["agreement"] == result.choices["best"]
    assert result.choices["stability"] == result.choices["worst"]


def test_the_setting_that_matters_is_ranked_first_and_named_in_the_table():
    result = summarized(("random",), samples=24)
    table = importance_table(result).to_pylist()
    assert (table[0]["path"], table[0]["kind"], table[0]["target"]) == (
        "head.dim",
        "setting",
        "miou",
    )
    assert table[0]["share"] == pytest.approx(1, abs=0.01)
    assert table[0]["best"] == "64"
    assert [row["rank"] for row in table] == [1, 2, 3, 1, 2, 3]


def test_curves_go_through_the_job_itself_and_hold_everything_else():
    axes, trials, records = finished(("one-at-a-time", "random"))
    result = summarize(trials, axes, records, "agreement")
    curve = next(one for one in result.curves if one.path == "head.dim")
    assert curve.values == (16, 64)
    assert curve.base == 1
    assert curve.means == pytest.approx((21.605, 26.405))
    assert curve.deviations == pytest.approx((0.0071, 0.0071), abs=1e-4)
    assert result.noise == pytest.approx(0.0071, abs=1e-4)
    flat = next(one for one in result.curves if one.path == "loss.self.shift")
    assert len(flat.values) == 3  # both values and the job's own 0.08
    assert flat.base == 0


def test_without_labels_the_criterion_stands_in():
    result = summarized(labelled=False)
    assert result.target == "agreement"
    assert result.choices == {}
    assert result.importances[0].path == "head.dim"


def test_the_best_trial_is_chosen_by_the_criterion_and_never_by_scores():
    axes, trials, records = finished()
    for record in records.values():
        record["scores"]["miou"] = 100 - record["scores"]["miou"]
    result = summarize(trials, axes, records, "agreement")
    best = best_trial(result, "agreement")
    assert (best["head.dim"], best["seed"]) == (64, 1)
    assert best["miou"] == min(row["miou"] for row in result.rows)
    assert best_trial(summarize(trials, axes, {}, "agreement"), "agreement") is None

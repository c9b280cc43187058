"""The space of a study: what is read, what is refused, and which trials it makes."""

import numpy as np
import pytest

from stego_core.config.load import dump_toml, load_job, validate
from stego_core.config.schema import TuneJob
from stego_core.config.space import Axis, read_space, study_settings
from stego_core.config.trials import make_trials, mining_key
from stego_core.errors import ConfigError

SETTINGS = study_settings()


def study(space, **tune):
    return validate(TuneJob, {"space": space, "tune": tune, "clusters": {"count": 27}})


def read(tmp_path, text, *flags):
    path = tmp_path / "study.toml"
    path.write_text(text)
    given = ["--config", str(path), "--clusters.count", "27"]
    return load_job(TuneJob, [*given, *flags], prog="tune.py")


def test_nested_tables_and_quoted_paths_are_the_same_space():
    nested, _ = read_space({"loss": {"knn": {"shift": [0.1]}}, "head": {"dim": [8]}}, SETTINGS)
    quoted, _ = read_space({"loss.knn.shift": [0.1], "head.dim": [8]}, SETTINGS)
    assert nested == quoted == [Axis("loss.knn.shift", (0.1,)), Axis("head.dim", (8,))]


def test_a_study_is_read_from_toml_and_written_back(tmp_path):
    text = (
        "[space]\nloss.samples = [5, 11]\ntrain.head_lr = {low = 1e-4, high = 1e-2, log = true}\n"
    )
    job = read(tmp_path, text, "--tune.sampler", "one-at-a-time", "random", "--seed", "3")
    assert job.tune.sampler == ("one-at-a-time", "random")
    again = tmp_path / "again.toml"
    again.write_text(dump_toml(job))
    assert load_job(TuneJob, ["--config", str(again)], prog="tune.py") == job
    assert [axis.path for axis in make_trials(job)[0]] == ["loss.samples", "train.head_lr"]


def test_every_problem_of_a_space_is_told_at_once_with_those_of_the_flags(tmp_path):
    text = """
[space]
loss.sampels = [5, 11]
head.dim = [0, 64]
head.kind = {low = 1, high = 2}
train.head_lr = {low = 1e-2, high = 1e-4}
train.probe_lr = {low = 0.0, high = 1e-4, log = true}
clusters.count = {low = 3}
neighbors.used = 4
train.batch = []
loss.negatives = [5, 5]
seed = [1, 2]
out = ["a"]
loss.knn = [1]
predict.alpha = [1.0]
tune.seeds = [2]
"""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, "--tune.seeds", "0")
    lines = caught.value.problems
    wanted = {
        "--tune.seeds 0": "must be more than 0",
        "loss.sampels": "did you mean loss.samples?",
        "head.dim = 0 in [space]": "must be more than 0",
        "space.head.kind": "only numbers have ranges",
        "space.train.head_lr": "low must be less than high",
        "train.probe_lr = 0.0 in [space]": "must be more than 0",
        "space.clusters.count": "a range has low, high",
        "space.neighbors.used": "give a list of values",
        "space.train.batch": "give a list of values",
        "space.loss.negatives": "a value stands there twice",
        "space.seed": "seeds are given by tune.seeds",
        "space.out": "a study keeps this setting",
        "space.loss.knn": "is a table",
        "space.predict.alpha": "a study keeps this setting",
        "tune": "unknown",
    }
    for start, rest in wanted.items():
        assert any(line.startswith(start) and rest in line for line in lines), (start, lines)
    assert len(lines) == len(wanted)


def test_a_logarithmic_range_must_start_above_zero():
    _, (line,) = read_space({"loss.crf": {"low": 0.0, "high": 1.0, "log": True}}, SETTINGS)
    assert line.endswith("a logarithmic range starts above 0")


def test_no_flag_gives_a_space():
    with pytest.raises(ConfigError, match="--space: unknown flag"):
        load_job(TuneJob, ["--space", "x"], prog="tune.py")


def test_a_study_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="nothing varies"):
        make_trials(TuneJob())


def test_settings_that_only_clash_together_are_refused_before_anything_runs():
    job = study({"neighbors.used": [5, 40]})
    with pytest.raises(ConfigError, match=r"neighbors.used = 40.*can't use more neighbours"):
        make_trials(job)


def test_one_at_a_time_visits_the_job_itself_and_each_other_value_once():
    job = study({"loss.samples": [5, 11], "head.dim": [16, 32, 64]}, seeds=2)
    _, trials = make_trials(job)
    visited = [(t.values["loss.samples"], t.values["head.dim"], t.seed) for t in trials]
    around = [(11, 64), (5, 64), (11, 16), (11, 32)]
    assert visited == [(*values, seed) for values in around for seed in (0, 1)]
    assert trials[2].job.loss.samples == 5
    assert trials[2].job.head.dim == 64
    assert trials[3].job.seed == 1


def test_a_grid_has_every_combination_and_a_range_its_points():
    space = {"train.head_lr": {"low": 1e-4, "high": 1e-2, "log": True}, "head.dim": [8, 16]}
    _, trials = make_trials(study(space, sampler=["grid"], points=3, seeds=1))
    rates = [t.values["train.head_lr"] for t in trials]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-3, 1e-3, 1e-2, 1e-2])
    assert [t.values["head.dim"] for t in trials] == [8, 16] * 3


def test_random_draws_lie_in_the_range_and_are_the_same_every_time():
    space = {
        "train.head_lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "clusters.count": {"low": 5, "high": 9},
    }
    job = study(space, sampler=["random"], samples=40, seeds=1)
    first, second = make_trials(job)[1], make_trials(job)[1]
    assert [t.key for t in first] == [t.key for t in second]
    rates = np.array([t.values["train.head_lr"] for t in first])
    assert rates.min() >= 1e-4
    assert rates.max() <= 1e-2
    assert 0.3 < (rates < 1e-3).mean() < 0.7  # half of a logarithmic range is below its middle
    assert {t.values["clusters.count"] for t in first} == {5, 6, 7, 8, 9}


def test_draws_survive_another_order_more_samples_and_the_resolved_configuration(tmp_path):
    text = "[space]\nloss.self.shift = [0.1, 0.2]\nhead.dim = [8, 16]\nloss.samples = [3, 5, 7]\n"
    job = read(tmp_path, text, "--tune.sampler", "random", "--tune.samples", "12")
    (tmp_path / "again.toml").write_text(dump_toml(job))
    again = load_job(TuneJob, ["--config", str(tmp_path / "again.toml")], prog="tune.py")
    assert [axis.path for axis in make_trials(again)[0]] != [a.path for a in make_trials(job)[0]]
    keys = [trial.key for trial in make_trials(job)[1]]
    assert [trial.key for trial in make_trials(again)[1]] == keys
    more = read(tmp_path, text, "--tune.sampler", "random", "--tune.samples", "20")
    assert [trial.key for trial in make_trials(more)[1]][: len(keys)] == keys


def test_a_setting_that_two_samplers_make_is_one_trial():
    space = {"head.dim": [32, 64]}
    _, trials = make_trials(study(space, sampler=["one-at-a-time", "grid"], seeds=1))
    assert [(t.values["head.dim"], t.samplers) for t in trials] == [
        (64, ("one-at-a-time", "grid")),
        (32, ("one-at-a-time", "grid")),
    ]


def test_a_key_follows_what_determines_the_result_and_nothing_else():
    def keys(**changes):
        values = {"space": {"head.dim": [32]}, "tune": {"seeds": 1}, "clusters": {"count": 5}}
        return [t.key for t in make_trials(validate(TuneJob, values | changes))[1]]

    base = keys()
    assert len({*base}) == 2
    assert keys(out="elsewhere", workers=2) == base
    assert not {*keys(train={"steps": 7})} & {*base}
    assert not {*keys(predict={"resolution": 160})} & {*base}
    assert keys(tune={"seeds": 1, "parallel": 3}) == base


def test_trials_share_a_mining_unless_it_would_differ():
    def minings(space):
        return len({mining_key(t.job) for t in make_trials(study(space))[1]})

    assert minings({"head.dim": [8, 64], "neighbors.used": [3, 7], "loss.samples": [4]}) == 1
    assert minings({"views.resolution": [112, 320]}) == 2
    assert minings({"backbone.feature": ["last", "key"], "neighbors.exclude_own": [False]}) == 3
    assert minings({"compat.mining_dropout": [True]}) == 3  # its draws follow the seed


def test_the_size_at_prediction_varies_without_another_mining():
    _, trials = make_trials(study({"predict.resolution": [160, 320]}, seeds=1))
    assert [trial.predict.resolution for trial in trials] == [320, 160]
    assert len({trial.key for trial in trials}) == 2
    assert len({mining_key(trial.job) for trial in trials}) == 1
    with pytest.raises(ConfigError, match=r"predict\.resolution = 8: must be at least 16"):
        make_trials(study({"predict.resolution": [8]}))


def test_a_grid_that_can_never_end_is_refused():
    space = {f"loss.{kind}.shift": {"low": 0.0, "high": 1.0} for kind in ("self", "knn", "random")}
    with pytest.raises(ConfigError, match="125000 combinations"):
        make_trials(study(space, sampler=["grid"], points=50))


def test_draws_have_seeds_of_their_own():
    space = {"head.dim": {"low": 8, "high": 4000}}
    job = study(space, sampler=["one-at-a-time", "random"], samples=4, seeds=3, draw_seeds=1)
    _, trials = make_trials(job)
    assert len([t for t in trials if t.samplers == ("random",)]) == 4
    assert len([t for t in trials if t.samplers == ("one-at-a-time",)]) == 3 * 6


def test_trials_do_not_choose_their_numbers_of_clusters_unless_that_is_the_question():
    with pytest.raises(ConfigError, match=r"clusters\.count = 0: trials"):
        make_trials(validate(TuneJob, {"space": {"loss.samples": [5]}}))
    _, trials = make_trials(validate(TuneJob, {"space": {"clusters": {"count": [0, 3]}}}))
    assert {trial.job.clusters.count for trial in trials} == {0, 3}


def test_the_job_comes_first_however_samplers_are_named():
    space = {"head.dim": [32, 64], "loss.samples": [5, 11]}
    _, trials = make_trials(study(space, sampler=["grid", "one-at-a-time"], seeds=1))
    assert (trials[0].job.head.dim, trials[0].job.loss.samples) == (64, 11)
    assert trials[0].samplers == ("one-at-a-time", "grid")
    assert len(trials) == 4

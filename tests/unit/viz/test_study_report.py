"""The report of a study: complete, self-contained, and safe with any name."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from stego_core.config.load import validate
from stego_core.config.schema import TuneJob
from stego_core.config.trials import make_trials
from stego_core.metrics.study import Curve, summarize
from stego_core.viz.charts import curves_svg, heat_map_svg
from stego_core.viz.study import write_study


def curve(**changes):
    values = {"values": (1, 2), "means": (10.0, 20.0), "deviations": (1.0, float("nan"))}
    return Curve(**{"path": "head.dim", "base": 0, **values, **changes})


def test_curves_share_one_scale_and_higher_scores_are_drawn_higher():
    root = ET.fromstring(curves_svg([curve(), curve(path="x", means=(15.0, 15.0))], "miou"))
    circles = [element for element in root.iter() if element.tag.endswith("circle")]
    heights = [float(circle.get("cy")) for circle in circles]
    assert heights[1] < heights[2] == heights[3] < heights[0]
    assert heights[2] == pytest.approx((heights[0] + heights[1]) / 2, abs=0.2)


def test_names_are_text_and_missing_numbers_leave_a_gap():
    broken = curve(path="<script>", means=(float("nan"), 3.0))
    root = ET.fromstring(curves_svg([broken], "miou"))
    assert "<script>" in [element.text for element in root.iter()]
    assert len([element for element in root.iter() if element.tag.endswith("circle")]) == 1
    ET.fromstring(curves_svg([], "miou"))


def test_the_heat_map_shows_shares_and_pairs_in_percent():
    shares = {"a": 0.5, "b": -0.1, "c": float("nan")}
    text = heat_map_svg(shares, {("a", "b"): 0.25, ("c", "a"): 0.0, ("b", "c"): float("nan")})
    labels = [element.text for element in ET.fromstring(text).iter() if element.text]
    assert labels.count("50 %") == 1
    assert labels.count("25 %") == 2  # on both sides of the diagonal
    assert labels.count("–") == 3


def test_a_study_without_a_finished_trial_still_has_a_page(tmp_path):
    study = {"space": {"head.dim": [8, 16]}, "clusters": {"count": 5}}
    axes, trials = make_trials(validate(TuneJob, study))
    index = write_study(str(tmp_path / "report"), summarize(trials, axes, {}, "margin"), "margin")
    page = Path(index).read_text()
    assert "6 missing" in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "index.html",
        "curves.svg",
        "interactions.svg",
    }

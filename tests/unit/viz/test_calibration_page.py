from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from factories import FakeFeatures, random_maps

from stego_core.masks.palette import cluster_colors
from stego_core.training.calibration import QUANTILES, calibrate
from stego_core.viz.calibration import CalibrationFacts, correspondences_svg, read_calibration
from stego_core.viz.report import ReportFacts, write_report

EVENT = {
    "event": "calibration",
    "mode": "auto",
    "shifts": {"self": 0.16, "knn": 0.16, "random": 0.16},
    "means": {"self": 0.3, "knn": 0.1, "random": 0.0},
    "quantiles": {
        "self": [-0.1, 0.0, 0.2, 0.5, 0.9],
        "knn": [-0.2, 0.0, 0.1, 0.2, 0.4],
        "random": [-0.2, -0.1, 0.0, 0.1, 0.14],
    },
    "attracted": {"self": 0.6, "knn": 0.3, "random": 0.03},
}


def without(*path):
    """The event with one entry less, or a wrong one."""
    event = {**EVENT, path[0]: dict(EVENT[path[0]])}
    if len(path) == 1:
        del event[path[0]]
    else:
        event[path[0]][path[1]] = path[2]
    return event


def page(tmp_path, calibration):
    facts = ReportFacts("Run", [], {}, [], {}, "", calibration)
    return Path(write_report(str(tmp_path), [], facts, ["a"], cluster_colors(1))).read_text()


def test_the_page_shows_the_numbers_of_each_kind(tmp_path):
    html = page(tmp_path, read_calibration(EVENT))
    section = html.split('id="calibration"')[1].split("</section>")[0]
    rows = re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', section)
    cells = {kind: re.findall(r"<td[^>]*>([^<]*)</td>", row) for kind, row in rows}
    assert cells["self"] == [
        "-0.100", "0.000", "0.200", "0.500", "0.900", "0.300", "0.160", "60.0 %"
    ]  # fmt: skip
    assert cells["random"][-1] == "3.0 %"
    assert list(cells) == ["self", "knn", "random"]


def test_a_run_without_calibration_has_no_such_section(tmp_path):
    assert 'id="calibration"' not in page(tmp_path, None)


@pytest.mark.parametrize(
    "event",
    [
        {},
        without("means"),
        without("quantiles", "knn", [0, 1]),
        without("quantiles", "knn", ["<b>", 0, 0, 0, 0]),
        without("shifts", "self", math.nan),
        {**EVENT, "attracted": 3},
    ],
)
def test_an_event_that_is_not_whole_is_no_calibration(event):
    assert read_calibration(event) is None


def test_an_older_event_without_attracted_pairs_is_still_shown(tmp_path):
    event = {key: value for key, value in EVENT.items() if key != "attracted"}
    assert "–</td></tr>" in page(tmp_path, read_calibration(event))


def test_the_drawing_is_to_scale():
    facts = read_calibration(EVENT)
    assert isinstance(facts, CalibrationFacts)
    tree = ElementTree.fromstring(correspondences_svg(facts))
    ranges = [e for e in tree.iter("line") if e.get("class") == "range"]
    shifts = [float(e.get("x1")) for e in tree.iter("line") if e.get("class") == "b"]
    assert len(ranges) == 3
    first = ranges[0]
    scale = (float(first.get("x2")) - float(first.get("x1"))) / (0.9 - -0.1)
    assert shifts[0] - float(first.get("x1")) == pytest.approx(scale * (0.16 - -0.1), abs=0.2)
    assert len(set(shifts)) == 1


def test_what_a_training_measures_is_what_the_page_reads():
    found = calibrate(FakeFeatures(random_maps(2)), np.array([[1], [0]]), seed=0)
    facts = read_calibration({"mode": "auto", **asdict(found)})
    assert facts is not None
    assert len(facts.kinds[0].quantiles) == len(QUANTILES)
    assert facts.kinds[2].shift == found.shifts["random"]

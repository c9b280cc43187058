"""The frame of the benchmarks: medians, bars, and the table in the document."""

import json
from pathlib import Path

import pytest

from benchmarks import common, render
from benchmarks.common import Options, Row


def test_a_bar_is_reached_by_the_median_in_its_direction() -> None:
    assert Row("a", "b", 2, [1.0, 2.0, 9.0]).is_reached
    assert not Row("a", "b", 2, [1.0, 1.9, 9.0]).is_reached
    assert Row("a", "b", 1.1, [1.0, 1.1, 5.0], direction="at most").is_reached
    assert not Row("a", "b", 1.1, [1.0, 1.2, 5.0], direction="at most").is_reached


def test_the_table_replaces_only_what_lies_between_the_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    rows = [Row("fast CRF", "pydensecrf", 5, [4.0, 6.0, 7.0]), Row("s", "t", 0.85, [0.8], unit="%")]
    facts = common.machine() | {"commit": "abc1234+"}
    common.write("crf", rows, facts, 12.3, Options(run="Monday"))
    (tmp_path / "knn.json").write_text(json.dumps({"other": "study"}))
    results = render.read_results(tmp_path)
    assert [result["benchmark"] for result in results] == ["crf"]
    document = f"above\n{render.BEGIN}\nold\n{render.END}\nbelow"
    new = render.render(document, results)
    assert new.startswith("above\n")
    assert new.endswith("\nbelow")
    assert "old" not in new
    assert "| fast CRF | pydensecrf | at least 5 times | **6 times** | 4 times to 7 times |" in new
    assert "| s | t | at least 85 % | 80 % | 80 % to 80 % |" in new
    assert "\nRun of Monday, " in new
    assert ", commit abc1234+: crf" in new
    assert render.render(new, results) == new


def test_a_benchmark_that_measured_nothing_keeps_the_earlier_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    common.write("schedule", [Row("a", "b", 1, [1.0])], {}, 1, Options())
    before = (tmp_path / "schedule.json").read_bytes()
    common.write("schedule", [], {}, 1, Options())
    assert (tmp_path / "schedule.json").read_bytes() == before
    common.write("other", [], {}, 1, Options())
    assert not (tmp_path / "other.json").exists()


def test_rows_that_need_data_are_kept_with_their_run_until_they_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    facts = common.machine()

    def measured(value: float, run: str, data: str | None) -> str:
        rows = [Row("plain", "b", 9, [value])]
        rows += [Row("scored", "b", 9, [value], needs_data=True)] if data else []
        common.write("crf", rows, facts, value, Options(data=data, run=run))
        return render.table(render.read_results(tmp_path))

    measured(1, "Monday", "labelled")
    for value, run in ((2, "Tuesday"), (3, "Wednesday")):
        table = measured(value, run, None)
        assert f"| plain | b | at least 9 times | {value} times |" in table
        assert "| scored | b | at least 9 times | 1 times |" in table
        assert table.count("Run of") == 2
        assert f"Run of {run}, " in table
        assert table.endswith("crf (only: scored).")
    table = measured(4, "Thursday", "labelled")
    assert "| scored | b | at least 9 times | 4 times |" in table
    assert table.count("Run of") == 1


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="begin of the table"):
        render.render("text", [])


def test_the_shipped_document_has_the_markers() -> None:
    document = render.DOCUMENT.read_text()
    assert render.BEGIN in document
    assert render.END in document

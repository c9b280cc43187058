"""The line that a report offers for DuckDB, run by a shell as it is."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stego_core.viz.build import query_line
from stego_core.viz.summary import describe

pytest.importorskip("duckdb")


@pytest.mark.parametrize("name", ["masks", "june's masks, day 1", 'a "$HOME" `id` b'])
def test_the_line_finds_the_images_with_the_most_of_a_cluster(name, tmp_path):
    folder = tmp_path / name / "masks"
    folder.mkdir(parents=True)
    areas = [[{"cluster": 0, "share": 0.25}, {"cluster": 3, "share": 0.75}], None, []]
    table = pa.table({"image_uri": ["a", "b", "c"], "clusters": areas})
    pq.write_table(table, folder / "part-00000.parquet")
    line = query_line(str(tmp_path / name), python=shlex.quote(sys.executable))
    shown = subprocess.run(line, shell=True, check=True, capture_output=True, text=True).stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    assert [row[1:] for row in rows if row[:1] == ["a"]] == [["3", "0.75"], ["0", "0.25"]]


def test_the_summary_names_a_python_that_has_duckdb(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.chdir(tmp_path)
    assert "\n  .venv/bin/python -c 'import duckdb" in describe("runs/x", str(tmp_path / "masks"))

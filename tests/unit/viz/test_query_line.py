"""The line that a report offers for DuckDB, run as it is."""

from __future__ import annotations

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stego_core.viz.build import query_line


@pytest.mark.parametrize("name", ["masks", "june's masks, day 1"])
def test_the_query_finds_the_images_with_the_most_of_a_cluster(name, tmp_path):
    folder = tmp_path / name / "masks"
    folder.mkdir(parents=True)
    areas = [[{"cluster": 0, "share": 0.25}, {"cluster": 3, "share": 0.75}], None, []]
    table = pa.table({"image_uri": ["a", "b", "c"], "clusters": areas})
    pq.write_table(table, folder / "part-00000.parquet")
    line = query_line(str(tmp_path / name))
    command, query, rest = line.split('"')
    assert (command, rest) == ("duckdb -c ", "")
    assert duckdb.sql(query).fetchall() == [("a", 3, 0.75), ("a", 0, 0.25)]

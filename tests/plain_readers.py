"""What other programs read from our files, where Ray and this package can't be imported.

`python plain_readers.py FILE` of masks prints JSON: for each reader that is installed, the rows in
their order (status, label map, pixels of all clusters), and which modules of Ray and ours came in.
Of several files, whatever they are of, it prints how many rows each reader finds.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import tempfile

import numpy as np
from PIL import Image

HIDDEN = ("ray", "stego_core")


def label_map(data):
    return None if data is None else np.asarray(Image.open(io.BytesIO(data))).tolist()


def pixels(clusters):
    return None if clusters is None else int(sum(one["pixels"] for one in clusters))


def with_pyarrow(path):
    import pyarrow.parquet as pq

    for row in pq.read_table(path).to_pylist():
        mask = row["mask"] or {"bytes": None}
        yield row["status"], label_map(mask["bytes"]), pixels(row["clusters"])


def with_duckdb(path):
    import duckdb

    areas = "(select sum(c.pixels) from (select unnest(clusters) as c))"
    query = f"select status, mask.bytes, {areas} from '{path}' order by image_id"
    for status, data, area in duckdb.sql(query).fetchall():
        yield status, label_map(data), area and int(area)


def with_polars(path):
    import polars as pl

    areas = pl.col("clusters").list.eval(pl.element().struct.field("pixels")).list.sum()
    data = pl.col("mask").struct.field("bytes")
    frame = pl.scan_parquet(path).select("status", data, areas=areas).collect()
    for status, png, area in frame.rows():
        yield status, label_map(png), area


def with_pandas(path):
    import pandas as pd

    frame = pd.read_parquet(path)
    for status, mask, clusters in zip(
        frame["status"], frame["mask"], frame["clusters"], strict=True
    ):
        yield status, label_map((mask or {"bytes": None})["bytes"]), pixels(clusters)


def with_datasets(path):
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        from datasets import load_dataset

        for row in load_dataset("parquet", data_files=path, split="train"):
            # Decoded by `datasets`, as the file's metadata tells it to.
            assert row["mask"] is None or isinstance(row["mask"], Image.Image)
            shown = None if row["mask"] is None else np.asarray(row["mask"]).tolist()
            yield row["status"], shown, pixels(row["clusters"])


READERS = {
    "pyarrow": with_pyarrow,
    "duckdb": with_duckdb,
    "polars": with_polars,
    "pandas": with_pandas,
    "datasets": with_datasets,
}


def count_rows(reader, path):
    if reader == "pyarrow":
        import pyarrow.parquet as pq

        return pq.read_table(path).num_rows
    if reader == "duckdb":
        import duckdb

        return len(duckdb.sql(f"select * from '{path}'").fetchall())
    if reader == "polars":
        import polars as pl

        return len(pl.read_parquet(path))
    if reader == "pandas":
        import pandas as pd

        return len(pd.read_parquet(path))
    import pyarrow.parquet as pq

    if not pq.read_metadata(path).num_rows:
        return 0  # `datasets` refuses a file without rows, such as the quarantine of a good run
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        from datasets import load_dataset

        return load_dataset("parquet", data_files=path, split="train", cache_dir=folder).num_rows


def main(paths):
    # Python refuses to import what is None here.
    sys.modules |= dict.fromkeys(HIDDEN)
    installed = [name for name in READERS if importlib.util.find_spec(name)]
    if len(paths) == 1:
        found = {name: list(READERS[name](paths[0])) for name in installed}
    else:
        found = {name: [count_rows(name, path) for path in paths] for name in installed}
    came = [name for name, there in sys.modules.items() if there and name.split(".")[0] in HIDDEN]
    sys.stdout.write(json.dumps({"rows": found, "imported": came}))


if __name__ == "__main__":
    main(sys.argv[1:])

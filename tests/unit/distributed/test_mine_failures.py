"""Images that could not be read come back: by `--retry`, or where there was no other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from factories import write_tree

from stego_core.config.schema import MineJob
from stego_core.distributed.mine_failures import forget_failures, quarantine_failures, views_key
from stego_core.errors import ImageProblem, InputError
from stego_core.storage.feature_store import SCHEMA, Views, read_views, unit_names, write_unit
from stego_core.storage.manifest import Manifest, list_images, write_manifest
from stego_core.storage.run import RunDirectory

DENIED, EMPTY = ImageProblem.READ_DENIED, ImageProblem.EMPTY


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    root = write_tree(tmp_path / "in", {f"{n}.png": b"x" for n in range(4)})
    uri = str(tmp_path / "manifest.parquet")
    return write_manifest(uri, list_images(str(root)), unit_images=1)


def store(folder: Path, manifest: Manifest, problems: list[ImageProblem | None]) -> Views:
    """Write a unit for each image: usable, or with this problem."""
    ids = manifest.read(["image_id"])["image_id"].to_pylist()
    for unit, (image_id, problem) in enumerate(zip(ids, problems, strict=True)):
        row = dict.fromkeys(SCHEMA.names) | {"image_id": image_id, "crop": 0}
        row |= {"status": "ok", "embedding": [1.0, 0.0]}
        if problem is not None:
            row |= {"status": problem.value, "detail": "why", "embedding": None}
        maps = np.zeros((1, 1, 1, 2)) if problem is None else None
        write_unit(str(folder), unit, pa.Table.from_pylist([row], SCHEMA), maps)
    return read_views(str(folder), manifest.num_units)


def test_only_units_whose_reason_may_pass_are_done_again(
    manifest: Manifest, tmp_path: Path
) -> None:
    store(tmp_path / "store", manifest, [None, DENIED, EMPTY, ImageProblem.TIMED_OUT])
    forget_failures(str(tmp_path / "store"), manifest)
    assert unit_names(str(tmp_path / "store")) == {0, 2}


def test_what_is_made_of_views_is_made_anew_when_images_come_back(
    manifest: Manifest, tmp_path: Path
) -> None:
    keys = [
        views_key("k", store(tmp_path / str(number), manifest, [None, *problems]))
        for number, problems in enumerate(
            [[None, None, None], [EMPTY, None, None], [DENIED, None, None], [DENIED, DENIED, EMPTY]]
        )
    ]
    assert keys[:2] == ["k", "k"]
    assert len({*keys}) == 3


def test_a_run_that_could_read_nothing_looks_again(manifest: Manifest, tmp_path: Path) -> None:
    uri, run = str(tmp_path / "store"), RunDirectory(str(tmp_path / "run"), job="mine")
    views = store(tmp_path / "store", manifest, [DENIED, DENIED, EMPTY, DENIED])
    with pytest.raises(InputError, match="none of 4 images can be used, the first: why"):
        quarantine_failures(MineJob(), run, views, manifest, store_uri=uri)
    assert unit_names(uri) == {2}
    views = dataclasses.replace(store(tmp_path / "store", manifest, [DENIED, None, None, None]))
    quarantine_failures(MineJob(), run, views, manifest, store_uri=uri)
    assert unit_names(uri) == {0, 1, 2, 3}

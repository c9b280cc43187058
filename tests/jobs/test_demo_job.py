"""`make demo` as users give it, twice, on a few pictures and random weights, without a cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray_cluster import ROOT, draw_pictures, stand_in_weights, states

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]
PICTURES = 12
MASKS = ("run-masks", "masks")


@dataclass(frozen=True)
class Demo:
    """Two runs of the same command, and what lay there after each.

    Attributes:
        run: run directory of the training.
        masks: output of the segmentation.
        runs: what make printed.
        states: of each file of model, features, neighbours and masks.
    """

    run: Path
    masks: Path
    runs: list[subprocess.CompletedProcess[str]]
    states: list[dict[Path, tuple[int, int]]]


def is_result(path: Path) -> bool:
    # The list of what is to be embedded is written before anybody looks for what is.
    return path.is_file() and path.name != "manifest.parquet"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    root = tmp_path_factory.mktemp("june's demo")  # quotes and spaces have to survive make
    photos = draw_pictures(root / "my photos", PICTURES)
    stand_in_weights(root / "cache")
    run, masks = root / "run", root / "run-masks"
    config = root / "short.toml"
    config.write_text("""
        views.resolution = 112
        train = { steps = 5, batch = 4, log_every = 1 }
        clusters = { count = 4, sample = 500 }
    """)
    # The interpreter of the tests in place of .venv, which is not set up (-o).
    command = ["make", "demo", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed-base"]
    command += [f"IMAGES={photos}", f"RUN={run}", f"CONFIG={config}"]
    # Else a make below that of `make test` takes over its flags, and ends with a line of its own.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    where = {"RAY_ADDRESS": "local", "XDG_CACHE_HOME": str(root / "cache")}
    found = Demo(run, masks, [], [])
    for _ in range(2):
        made = subprocess.run(
            command, cwd=ROOT, env=inherited | where, capture_output=True, text=True, timeout=600
        )
        assert made.returncode == 0, made.stdout + made.stderr
        found.runs.append(made)
        kept = states(run / "model", run / "features", run / "neighbors", root.joinpath(*MASKS))
        found.states.append({path: state for path, state in kept.items() if is_result(path)})
    return found


def test_make_demo_makes_a_mask_of_every_picture_and_a_page_of_them(demo: Demo) -> None:
    rows = pq.read_table(sorted((demo.masks / "masks").glob("*.parquet"))).to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * PICTURES
    assert len({row["image_uri"] for row in rows}) == PICTURES
    report = demo.masks / "report"
    assert len(list((report / "images").glob("*-overlay.jpg"))) == PICTURES
    assert "loss/total" in (report / "index.html").read_text()


def test_a_second_make_demo_computes_nothing_anew_and_says_so(demo: Demo) -> None:
    first, second = demo.states
    assert second == first
    kept = {path.relative_to(demo.run.parent).parts[:2] for path in first}
    assert kept == {("run", "model"), ("run", "features"), ("run", "neighbors"), MASKS}
    for made, is_said in zip(demo.runs, (False, True), strict=True):
        assert ("features: reused, key " in made.stderr) is is_said
        assert (f"{demo.run} is trained: nothing to do" in made.stderr) is is_said
        assert (f"{demo.masks} is complete: nothing to do" in made.stderr) is is_said


def test_make_demo_ends_by_naming_what_it_made_and_a_line_that_queries_it(demo: Demo) -> None:
    for made in demo.runs:
        *told, question, line = made.stdout.rstrip().splitlines()[-7:]
        named = dict(text.split(maxsplit=1) for text in told if text)
        assert named["model"] == f"{demo.run}/model/model.safetensors"
        assert named["masks"].startswith(f"{demo.masks}/masks/*.parquet  (1 file(s); ok {PICTURES}")
        assert named["report"].startswith(f"{demo.masks}/report/index.html  (open it")
        assert question == "Which images show most of one cluster?"
        assert "duckdb.sql(" in line
        assert f"{demo.masks}/masks/*.parquet".replace("'", "''") in line


@pytest.mark.skipif(find_spec("duckdb") is None, reason="DuckDB is not installed")
def test_the_line_that_make_demo_ends_with_queries_the_masks_in_a_shell(demo: Demo) -> None:
    line = demo.runs[-1].stdout.rstrip().splitlines()[-1].strip()
    asked = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert asked.returncode == 0, asked.stderr
    # Not the rows: DuckDB breaks a long path wherever its column ends.
    assert all(name in asked.stdout for name in ("image_uri", "cluster", "share"))

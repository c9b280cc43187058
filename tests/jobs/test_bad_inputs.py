"""What users get wrong: unusable pictures, wrong folders, wrong flags. Jobs run as processes."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray_cluster import SEGMENT, TINY, Cluster, draw_pictures, states

pytestmark = pytest.mark.ray

ODD_NAME = 'grüße 100% "it\'s" #1? [a]&b.png'
REASONS = {
    "empty.jpg": "empty",
    "truncated.jpg": "truncated",
    "text.jpg": "not_an_image",
    "huge.png": "too_many_pixels",
    "one.png": "too_small",
    "moving.gif": "unsupported_format",
}
USABLE = {f"picture-{n:03d}.png" for n in range(3)} | {"cmyk.jpg", "sub/folder/deep.png", ODD_NAME}
JOBS = ("mine_neighbors.py", "train.py", "segment_bucket.py", "evaluate.py", "report.py")


def write_bad_pictures(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(5)
    noise = Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(folder / "whole.jpg")
    data = (folder / "whole.jpg").rename(folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not a picture at all\n" * 50)
    (folder / "huge.png").write_bytes(png_header(30_000, 30_000))
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    first, second = (Image.new("P", (32, 32), colour) for colour in (0, 1))
    first.save(folder / "moving.gif", save_all=True, append_images=[second])
    return folder


def png_header(width: int, height: int) -> bytes:
    """A PNG that states its size and holds no pixel: to be refused before any is decoded."""

    def chunk(kind: bytes, payload: bytes) -> bytes:
        body = kind + payload
        return struct.pack(">I", len(payload)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IEND", b"")


@dataclass(frozen=True)
class Segmented:
    folder: Path
    out: Path
    job: list[str]

    def rows(self) -> dict[str, dict]:
        table = pq.read_table(sorted((self.out / "masks").glob("*.parquet")))
        rows = table.to_pylist()
        found = {str(Path(row["image_uri"]).relative_to(self.folder)): row for row in rows}
        assert len(found) == len(rows)
        return found

    def quarantine(self) -> list[dict]:
        return pq.read_table(self.out / "quarantine.parquet").to_pylist()

    def counts(self) -> dict:
        return json.loads((self.out / "status.json").read_text())["counts"]


def ended(out: Path) -> tuple[str, int]:
    status = json.loads((out / "status.json").read_text())
    return status["state"], status["exit_code"]


@pytest.fixture(scope="module")
def mixed(cluster: Cluster, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Segmented:
    """A folder of good and bad pictures, segmented without a limit on failures."""
    root = tmp_path_factory.mktemp("mixed")
    folder = draw_pictures(root / "pictures", 3, seed=9)
    write_bad_pictures(folder)
    (folder / "sub" / "folder").mkdir(parents=True)
    with Image.open(folder / "picture-000.png") as picture:
        picture.save(folder / "sub" / "folder" / "deep.png")
        picture.save(folder / ODD_NAME)
        picture.convert("CMYK").save(folder / "cmyk.jpg")
    (folder / "notes.txt").write_text("not an input")
    (folder / "empty folder").mkdir()
    job = ["segment_bucket.py", "--input", str(folder), "--model", str(model), *SEGMENT]
    cluster.run(*job, "--out", str(root / "out"))  # exit code 0
    return Segmented(folder, root / "out", job)


def test_every_input_has_one_row_and_only_usable_ones_a_mask(mixed: Segmented) -> None:
    rows = mixed.rows()
    assert set(rows) == USABLE | set(REASONS)  # so notes.txt is no input
    for name in USABLE:
        assert rows[name]["status"] == "ok", name
        assert rows[name]["mask"]["bytes"].startswith(b"\x89PNG")
    for name, reason in REASONS.items():
        assert rows[name]["status"] == reason, name
        assert rows[name]["detail"]
        assert "\n" not in rows[name]["detail"]
        assert rows[name]["mask"] is rows[name]["mask_height"] is None
        assert not rows[name]["clusters"]
    assert rows["huge.png"]["detail"].startswith("30000 x 30000")


def test_the_same_picture_has_the_same_mask_under_any_name(mixed: Segmented) -> None:
    rows = mixed.rows()
    masks = {rows[name]["mask"]["bytes"] for name in ("picture-000.png", ODD_NAME)}
    assert masks == {rows["sub/folder/deep.png"]["mask"]["bytes"]}


def test_quarantine_and_status_tell_the_same_as_the_rows(mixed: Segmented) -> None:
    rows = mixed.rows()
    quarantine = {row["image_id"]: row for row in mixed.quarantine()}
    assert len(quarantine) == len(mixed.quarantine()) == len(REASONS)
    for name in REASONS:
        found, row = quarantine[rows[name]["image_id"]], rows[name]
        assert (found["reason"], found["detail"]) == (row["status"], row["detail"])
        assert (found["stage"], found["image_uri"]) == ("segment", row["image_uri"])
    assert ended(mixed.out) == ("done", 0)
    total = len(USABLE) + len(REASONS)
    counts = {"total": total, "done": total, "ok": len(USABLE)}
    assert mixed.counts() == counts | Counter(REASONS.values())


def test_a_budget_of_failures_ends_the_job_with_code_4_and_keeps_every_row(
    mixed: Segmented, cluster: Cluster
) -> None:
    before = mixed.rows()
    job = cluster.run(*mixed.job, "--out", str(mixed.out), "--max-failed", "0.1", check=4)
    assert "6 of 12 images can't be used" in one_error(job)
    assert ended(mixed.out) == ("failed", 4)
    assert mixed.counts()["ok"] == len(USABLE)
    assert mixed.rows() == before
    assert len(mixed.quarantine()) == len(REASONS)
    cluster.run(*mixed.job, "--out", str(mixed.out), "--max-failed", "0.5")
    assert ended(mixed.out) == ("done", 0)


def test_a_folder_of_only_bad_pictures_ends_with_code_4_after_all_rows_are_written(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    folder = write_bad_pictures(tmp_path / "bad")
    job = ["segment_bucket.py", "--input", str(folder), "--model", str(model), *SEGMENT]
    done = cluster.run(*job, "--out", str(tmp_path / "out"), check=4)
    assert "6 of 6" in one_error(done)
    bad = Segmented(folder, tmp_path / "out", job)
    assert {name: row["status"] for name, row in bad.rows().items()} == REASONS
    assert len(bad.quarantine()) == len(REASONS)
    assert ended(bad.out) == ("failed", 4)


def test_mining_leaves_out_what_can_not_be_used_and_says_why(
    mixed: Segmented, cluster: Cluster, tmp_path: Path
) -> None:
    job = ["mine_neighbors.py", "--data.root", str(mixed.folder), *TINY]
    cluster.run(*job, "--views.resolution", "64", "--out", str(tmp_path))
    quarantine = pq.read_table(tmp_path / "quarantine.parquet").to_pylist()
    assert Counter(row["reason"] for row in quarantine) == Counter(REASONS.values())
    assert {row["stage"] for row in quarantine} == {"mine"}
    table = pq.read_table(sorted((tmp_path / "neighbors").glob("*.parquet")))
    assert table.num_rows == len(USABLE)
    assert set(table["image_id"].to_pylist()).isdisjoint(row["image_id"] for row in quarantine)


def test_mining_nothing_usable_ends_with_code_3_after_the_reasons_are_written(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder = write_bad_pictures(tmp_path / "bad")
    job = ["mine_neighbors.py", "--data.root", str(folder), *TINY, "--out", str(tmp_path / "out")]
    assert "none of 6 images" in one_error(cluster.run(*job, check=3))
    quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet")
    assert Counter(quarantine["reason"].to_pylist()) == Counter(REASONS.values())


def one_error(job: subprocess.CompletedProcess) -> str:
    """Return the one line of error; there may be lines of progress before it."""
    assert "Traceback" not in job.stderr, job.stderr
    (line,) = [line for line in job.stderr.splitlines() if ": error: " in line]
    assert job.stderr.endswith(f"{line}\n")
    return line


def only_line(job: subprocess.CompletedProcess) -> str:
    assert job.stderr.count("\n") == 1, job.stderr
    return one_error(job)


@pytest.mark.parametrize("case", ["empty", "missing", "a file", "foo://x", "only notes"])
def test_nothing_to_read_is_one_line_and_exit_code_3(
    case: str, cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    folder, source = tmp_path / "in", str(tmp_path / "in")
    if case == "a file":
        folder.write_text("x")
    elif case != "missing":
        folder.mkdir()
    if case == "foo://x":
        source = case
    elif case == "only notes":
        (folder / "notes.txt").write_text("x")
    out = str(tmp_path / "out")
    job = ["segment_bucket.py", "--input", source, "--model", str(model), "--out", out]
    assert source in only_line(cluster.run(*job, check=3))
    assert ended(Path(out)) == ("failed", 3)
    assert not (tmp_path / "out" / "masks").exists()


@pytest.mark.parametrize("root", ["missing", "empty", "foo://x"])
@pytest.mark.parametrize("job", JOBS[:2])
def test_training_on_nothing_is_one_line_and_exit_code_3(
    job: str, root: str, cluster: Cluster, tmp_path: Path
) -> None:
    where = replace(cluster, folder=tmp_path)
    (tmp_path / "empty").mkdir()
    done = where.run(job, "--data.root", root, "--out", "out", *TINY, check=3)
    assert root in only_line(done)
    assert ended(tmp_path / "out") == ("failed", 3)


@pytest.mark.parametrize("job", ["train.py", "segment_bucket.py"])
def test_a_cluster_that_is_away_is_one_line_and_exit_code_5(
    job: str, cluster: Cluster, model: Path, data: Path, tmp_path: Path
) -> None:
    source = ["--data.root", str(data), *TINY]
    if job == "segment_bucket.py":
        source = ["--input", str(data), "--model", str(model)]
    with socket.socket() as nobody:  # bound, but it does not listen
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        away = replace(cluster, env=cluster.env | {"RAY_ADDRESS": address})
        done = away.run(job, *source, "--out", str(tmp_path / "out"), check=5)
    assert address in one_error(done)
    assert ended(tmp_path / "out") == ("failed", 5)


def test_evaluation_without_labels_is_one_line_and_exit_code_3(
    cluster: Cluster, model: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "imgs").symlink_to(data / "imgs")
    job = ["evaluate.py", "--model", str(model), "--out", str(tmp_path / "out")]
    line = only_line(cluster.run(*job, "--data.root", str(tmp_path / "root"), check=3))
    assert "labels/val" in line
    assert ended(tmp_path / "out") == ("failed", 3)


def test_evaluation_goes_on_without_some_labels_and_counts_them(
    cluster: Cluster, model: Path, data: Path, tmp_path: Path
) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    for folder in ("imgs/val", "labels/val"):
        (root / folder).mkdir(parents=True)
        for path in sorted((data / folder).iterdir()):
            (root / folder / path.name).symlink_to(path)
    labels = sorted((root / "labels" / "val").iterdir())
    labels[0].unlink()
    labels[1].unlink()
    labels[1].write_bytes(b"broken")
    write_bad_pictures(root / "imgs" / "val")
    job = ["--data.root", str(root), "--model", str(model), "--out", str(out), *SEGMENT]
    done = cluster.run("evaluate.py", *job)
    assert "data: 7 of 18 images have no label file" in done.stderr
    assert "can't be read and count as missing" in done.stderr
    protocol = json.loads((out / "protocol.json").read_text())
    assert (protocol["images"], protocol["images_without_labels"]) == (10, 2)
    status = json.loads((out / "status.json").read_text())
    assert (status["counts"]["scored"], status["counts"]["unlabelled"]) == (10, 2)
    assert "cluster.miou" in json.loads((out / "metrics.json").read_text())
    table = pq.read_table(out / "quarantine.parquet")
    (row,) = table.filter(pc.equal(table["stage"], "label")).to_pylist()
    assert row["image_uri"].endswith(f"imgs/val/{labels[1].stem}.png")
    assert row["reason"] == "not_an_image"


def lines(cluster: Cluster, out: Path, *command: str) -> list[str]:
    """Return the error lines of a job that must be refused before it touches anything."""
    job = cluster.run(*command, "--out", str(out), check=2)
    assert not out.exists()
    assert not job.stdout
    found = job.stderr.splitlines()
    assert all(line.startswith(f"{command[0]}: error: ") for line in found), job.stderr
    return [line.split(": error: ", 1)[1] for line in found]


def test_wrong_flags_and_wrong_files_are_refused_with_a_line_for_each_problem(
    cluster: Cluster, tmp_path: Path
) -> None:
    flags = ["--actorz", "2", "--predict.resolution", "large"]
    found = lines(cluster, tmp_path / "out", "segment_bucket.py", *flags)
    assert found[0].startswith("--actorz: unknown flag; did you mean --actors?")
    assert found[1:] == ["--predict.resolution large: not an integer"]
    (tmp_path / "bad.toml").write_text('sede = 3\n[train]\nbatch = "many"\n')
    toml = ["--config", str(tmp_path / "bad.toml")]
    unknown, wrong = lines(cluster, tmp_path / "out", "train.py", *toml)
    assert (unknown[:8], "unknown key" in unknown) == ("sede = 3", True)
    assert wrong.startswith('train.batch = "many"')


@pytest.mark.parametrize("job", JOBS[2:4])
def test_a_model_that_is_none_or_is_damaged_is_refused(
    job: str, cluster: Cluster, data: Path, model: Path, tmp_path: Path
) -> None:
    flag = "--input" if job == "segment_bucket.py" else "--data.root"
    source = [flag, str(data), "--model", str(tmp_path / "model")]
    (line,) = lines(cluster, tmp_path / "out", job, *source)
    assert "holds no trained model" in line
    (tmp_path / "model").mkdir()
    card = (model / "model" / "model.json").read_bytes()
    (tmp_path / "model" / "model.json").write_bytes(card)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
    (line,) = lines(cluster, tmp_path / "out", job, *source)
    assert str(tmp_path / "model") in line


@pytest.mark.parametrize("job", ["mine_neighbors.py", "train.py", "segment_bucket.py"])
def test_an_output_that_is_no_folder_is_one_line_and_exit_code_2(
    job: str, cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 2)
    (tmp_path / "file").write_text("x")
    flags = ["--input", str(pictures), "--model", str(model)]
    if job != "segment_bucket.py":
        flags = ["--data.root", str(pictures), *TINY]
    done = cluster.run(job, *flags, "--out", str(tmp_path / "file" / "out"), check=2)
    assert str(tmp_path / "file") in one_error(done)


def test_a_crf_without_its_library_is_refused_before_any_work(
    cluster: Cluster, model: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "pydensecrf.py").write_text("raise ImportError")
    without = replace(cluster, env=cluster.env | {"PYTHONPATH": str(tmp_path)})
    source = ["--input", str(data), "--model", str(model), "--crf", "--predict.crf", "dense"]
    (line,) = lines(without, tmp_path / "out", "segment_bucket.py", *source)
    assert "stego-ray[crf]" in line


@pytest.mark.parametrize("job", [*JOBS, "chaos.py"])
def test_a_dry_run_prints_a_plan_and_leaves_nothing_behind(
    job: str, cluster: Cluster, model: Path, data: Path, tmp_path: Path
) -> None:
    flags = {
        "mine_neighbors.py": ["--data.root", str(data), *TINY, "--out", "out"],
        "train.py": ["--data.root", str(data), *TINY, "--out", "out"],
        "segment_bucket.py": ["--input", str(data), "--model", str(model), "--out", "out"],
        "evaluate.py": ["--data.root", str(data), "--model", str(model), "--out", "out"],
        "report.py": ["--masks", "out", "--model", str(model)],
        "chaos.py": ["--out", "out"],
    }
    before = states(model, data)
    done = replace(cluster, folder=tmp_path).run(job, *flags[job], "--dry-run")
    assert len(done.stdout.splitlines()) >= 2
    assert str(tmp_path / "out") in done.stdout or job == "evaluate.py"
    assert not list(tmp_path.iterdir())
    assert states(model, data) == before

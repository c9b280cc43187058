"""The jobs from bucket to bucket, against a real S3 server on loopback."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray_cluster import ROOT, SEGMENT, TRAIN, Cluster
from s3_store import BUCKET, KEY_ID, SECRET, Store, needs_server

from stego_core.distributed.environment import worker_environment
from stego_core.model.registry import find_backbone
from stego_core.model.weights import cache_path

pytestmark = [pytest.mark.ray, pytest.mark.s3, needs_server]


VAL = ["--input", f"s3://{BUCKET}/data/imgs/val", "--model", f"s3://{BUCKET}/run", *SEGMENT]


@pytest.fixture(scope="module")
def said(s3_cluster: Cluster) -> str:
    """Train, segment, evaluate and report from bucket to bucket; all that the jobs printed."""
    root, out = f"s3://{BUCKET}/data", f"s3://{BUCKET}"
    train = ["--data.root", root, "--out", f"{out}/run", *TRAIN]
    score = ["--data.root", root, "--model", f"{out}/run", "--out", f"{out}/eval", *SEGMENT]
    show = ["--masks", f"{out}/out", "--model", f"{out}/run", "--metrics", f"{out}/eval"]
    jobs = [
        s3_cluster.run("train.py", *train),
        s3_cluster.run("segment_bucket.py", *VAL, "--out", f"{out}/out"),
        s3_cluster.run("evaluate.py", *score),
        s3_cluster.run("report.py", *show),
    ]
    return "".join(job.stdout + job.stderr for job in jobs)


def test_every_job_leaves_its_results_and_a_done_status_in_the_bucket(
    store: Store, said: str
) -> None:
    assert "train 30/30 (100 %)" in said
    for prefix in ("run", "out", "eval", "out/report"):
        status = json.loads(store.read(f"{prefix}/status.json"))
        assert (status["state"], status["exit_code"]) == ("done", 0), prefix
    keys = set(store.keys())
    assert {"run/model/model.safetensors", "out/_SUCCESS", "eval/metrics.json"} <= keys
    assert store.table("run/neighbors/").num_rows == 40
    metrics = json.loads(store.read("eval/metrics.json"))
    assert metrics["cluster.accuracy"] > 50  # three regions of three colours
    events = [json.loads(line) for line in store.read("run/events-train.jsonl").splitlines()]
    assert [e["step"] for e in events if e["event"] == "train/step"] == [20, 30]


@pytest.mark.usefixtures("said")
def test_the_report_of_a_bucket_shows_its_masks_curves_and_metrics(store: Store) -> None:
    page = store.read("out/report/index.html").decode()
    shown = set(re.findall(r'src="(images/[^"]+)"', page))
    assert len([name for name in shown if name.endswith("-overlay.jpg")]) == 12
    assert {f"out/report/{name}" for name in shown} <= set(store.keys())
    assert "loss/total" in page
    assert "cluster.miou" in page
    assert 'id="failures"' in page


@pytest.mark.usefixtures("said")
def test_masks_of_a_bucket_are_those_of_the_same_pictures_in_a_folder(
    store: Store, s3_cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    pictures, out = str(data / "imgs" / "val"), tmp_path / "local"
    model = f"s3://{BUCKET}/run"
    job = ["--input", pictures, "--model", model, "--out", str(out), *SEGMENT]
    s3_cluster.run("segment_bucket.py", *job)
    remote = store.table("out/masks/")
    local = pq.read_table(sorted((out / "masks").glob("*.parquet")))
    assert remote.num_rows == len(set(remote["image_id"].to_pylist())) == 12
    names = ["image_id", "image_bytes", "status", "mask", "clusters", "mask_height", "mask_width"]
    assert remote.select(names).to_pylist() == local.select(names).to_pylist()
    assert all(row["bytes"] for row in remote["mask"].to_pylist())
    assert remote["image_uri"][0].as_py().startswith(f"s3://{BUCKET}/data/imgs/val/")


@pytest.mark.usefixtures("said")
def test_a_second_run_into_the_bucket_does_nothing(store: Store, s3_cluster: Cluster) -> None:
    before = store.etags("out/masks/")
    again = s3_cluster.run("segment_bucket.py", *VAL, "--out", f"s3://{BUCKET}/out")
    assert "nothing to do" in again.stderr
    assert "connected to Ray" not in again.stderr
    assert store.etags("out/masks/") == before


def test_the_credentials_are_in_no_object_and_not_on_the_terminal(store: Store, said: str) -> None:
    for secret in (KEY_ID, SECRET):
        assert secret not in said
        for key in sorted(store.keys()):
            content = store.read(key)
            assert secret.encode() not in content, key
            if key.endswith(".parquet"):
                table = pq.read_table(io.BytesIO(content))
                assert secret not in f"{table.schema.metadata} {table.to_pylist()}", key


def one_line(job: subprocess.CompletedProcess) -> str:
    lines = [line for line in job.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, job.stderr
    assert SECRET not in lines[0]
    return lines[0]


@pytest.mark.usefixtures("said")
@pytest.mark.parametrize("name", ["no-such-bucket", f"{BUCKET}/no-such-prefix"])
def test_a_wrong_bucket_or_prefix_is_one_line_and_exit_code_3(
    name: str, s3_cluster: Cluster, tmp_path: Path
) -> None:
    segment = ["--input", f"s3://{name}", "--model", f"s3://{BUCKET}/run", "--out", str(tmp_path)]
    assert f"s3://{name}" in one_line(s3_cluster.run("segment_bucket.py", *segment, check=3))
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    train = ["--data.root", f"s3://{name}", "--out", str(tmp_path / "run")]
    assert f"s3://{name}" in one_line(s3_cluster.run("train.py", *train, check=3))


@pytest.mark.usefixtures("said")
def test_wrong_credentials_are_one_line_and_exit_code_3(
    s3_cluster: Cluster, tmp_path: Path
) -> None:
    wrong = replace(s3_cluster, env=s3_cluster.env | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    line = one_line(wrong.run("segment_bucket.py", *VAL, "--out", str(tmp_path), check=3))
    assert "ACCESS_DENIED" in line


@pytest.mark.usefixtures("said")
def test_nodes_that_may_not_read_the_bucket_end_the_job_with_the_reason(
    store: Store, cluster: Cluster, tmp_path: Path
) -> None:
    driver_only = replace(cluster, env=cluster.env | store.where | store.credentials)
    out = tmp_path / "out"
    job = driver_only.run("segment_bucket.py", *VAL, "--out", str(out), check=3)
    assert "Traceback" not in job.stderr, job.stderr
    (line,) = [line for line in job.stderr.splitlines() if "error" in line]
    assert "ACCESS_DENIED" in line
    assert json.loads((out / "status.json").read_text())["exit_code"] == 3


def test_workers_are_told_where_the_store_is_but_not_the_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "HF_", "RAY_JOB"))]:
        monkeypatch.delenv(name)
    pages = {"THP_MEM_ALLOC_ENABLE": "1"}
    assert worker_environment().keys() == {"py_modules", "env_vars"}
    assert worker_environment()["env_vars"] == pages
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "planted")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    told = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_REGION": "eu-central-1"}
    assert worker_environment()["env_vars"] == pages | told
    # Ray refuses a job whose driver gives a name that `ray job submit` gave already.
    submitted = {"working_dir": "gcs://x.zip", "env_vars": {"AWS_REGION": "eu-west-1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": submitted}))
    endpoint = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    assert worker_environment() == {"env_vars": pages | endpoint}
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # who sets it is right
    assert worker_environment() == {"env_vars": {"THP_MEM_ALLOC_ENABLE": "0"} | endpoint}


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.skipif(
    not cache_path(find_backbone("dinov2-vits14")).exists(),
    reason="DINOv2 weights are not in the cache",
)
def test_make_demo_takes_a_prefix_with_spaces_and_quotes(
    store: Store, s3_cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    prefix = "my photos, june's/day 1/"
    for path in sorted((data / "imgs" / "train").iterdir())[:24]:
        store.client.upload_file(str(path), BUCKET, prefix + path.name)
    config = tmp_path / "short.toml"
    config.write_text("train.steps = 20\nclusters.count = 4\nviews.resolution = 112\n")
    # The interpreter of the tests in place of .venv, which is not set up (-o).
    command = ["make", "demo", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed-base"]
    command += [f"IMAGES=s3://{BUCKET}/{prefix}", f"RUN={tmp_path}/june's run"]
    command += [f"CONFIG={config}"]
    made = subprocess.run(
        command, cwd=ROOT, env=s3_cluster.env, capture_output=True, text=True, timeout=570
    )
    assert made.returncode == 0, made.stdout + made.stderr
    rows = pq.read_table(tmp_path / "june's run-masks" / "masks")
    assert rows["status"].to_pylist() == ["ok"] * 24
    assert rows["image_uri"][0].as_py().startswith(f"s3://{BUCKET}/{prefix}picture-")
    report = tmp_path / "june's run-masks" / "report"
    assert len(list((report / "images").glob("*-overlay.jpg"))) == 24
    assert f"{report}/index.html" in made.stdout

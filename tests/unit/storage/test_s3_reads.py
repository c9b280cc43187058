"""What one process meets when it reads from a real S3 server: silence, refusals, profiles."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from ray_cluster import ROOT
from s3_store import BUCKET, KEY_ID, OPEN_BUCKET, SECRET, Store, needs_server

from stego_core.config.schema import ImageLimits
from stego_core.distributed.fetch import WholeImage, fetch_unit
from stego_core.storage import fs, retry, uris
from stego_core.storage.manifest import write_manifest

pytestmark = [pytest.mark.s3, needs_server]
FOLDER = "data/imgs/val"
PICTURE = f"{FOLDER}/picture-003.png"


@pytest.fixture
def here(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Let this process reach the bucket at the address that the function is given."""
    for name, value in (store.where | store.credentials).items():
        monkeypatch.setenv(name, value)
    uris._s3.cache_clear()
    yield partial(monkeypatch.setenv, "AWS_ENDPOINT_URL")
    uris._s3.cache_clear()


def test_a_request_that_is_never_answered_is_given_up_and_asked_again(
    here: Callable[[str], None],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(uris, "_REQUEST_TIMEOUT_S", 1)
    stalls = uris._SDK_ATTEMPTS  # with fewer the client's own repetition would do
    gets = Counter[str]()

    def choose(method: str, path: str) -> str | None:
        gets[method] += 1
        return "stall" if method == "GET" and gets["GET"] <= stalls else None

    with FaultProxy(store.port, choose=choose) as proxy, caplog.at_level(logging.DEBUG):
        here(proxy.url)
        content = fs.read_bytes(f"s3://{BUCKET}/{PICTURE}")
    assert content == store.read(PICTURE)
    assert proxy.faults == {"stall": stalls}
    (said,) = [record for record in caplog.records if record.name == retry.logger.name]
    assert "timeout" in said.getMessage().lower()


@pytest.mark.parametrize(("first", "asks"), [("HEAD", 1), ("GET", 2)])
def test_an_object_that_can_not_be_read_is_a_row_with_its_reason_and_no_other_is_lost(
    first: str,
    asks: int,
    here: Callable[[str], None],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    kinds = {"picture-002.png": "slow_down", "picture-005.png": "denied"}
    gone, asked = "picture-007.png", Counter[str]()

    def choose(method: str, path: str) -> str | None:
        name = Path(path).name
        asked[name] += 1
        if name == gone:  # between listing and reading
            store.client.delete_object(Bucket=BUCKET, Key=f"refused/{gone}")
        # An object's size is asked for before its content.
        return kinds.get(name) if method in (first, "GET") else None

    for key in store.keys(FOLDER):
        store.client.put_object(
            Bucket=BUCKET, Key=key.replace(FOLDER, "refused"), Body=store.read(key)
        )
    monkeypatch.setattr(retry, "retried", partial(retry.retried, seconds=0.3))
    monkeypatch.setattr(retry, "_DOUBT_S", 0.3)
    with FaultProxy(store.port, choose=choose) as proxy:
        here(proxy.url)
        files = list(fs.list_files(f"s3://{BUCKET}/refused"))
        manifest = write_manifest(str(tmp_path / "manifest.parquet"), files, unit_images=100)
        prepare = WholeImage(resolution=32, patch=16)
        rows = fetch_unit(0, manifest=manifest, prepare=prepare, limits=ImageLimits()).to_pylist()
    found = {Path(row["image_uri"]).name: row["status"] for row in rows}
    reasons = {"picture-002.png": "read_failed", "picture-005.png": "read_denied"}
    expected = {f"picture-{number:03d}.png": "ok" for number in range(12)}
    assert found == expected | reasons | {gone: "vanished"}
    (failed,) = [row["detail"] for row in rows if row["status"] == "read_failed"]
    # As pyarrow names it depends on whether the answer's body was read before it was dropped.
    assert any(word in failed for word in ("SLOW_DOWN", "SERVICE_UNAVAILABLE", "503"))
    # What may pass is asked for until the time is over, a refusal a few times.
    assert asked["picture-002.png"] > 2 * uris._SDK_ATTEMPTS
    assert asks < asked["picture-005.png"] <= 5 * asks


def test_an_object_that_goes_between_its_size_and_its_content_is_not_found(
    here: Callable[[str], None], store: Store
) -> None:
    store.client.put_object(Bucket=BUCKET, Key="going/x", Body=store.read(PICTURE))

    def choose(method: str, path: str) -> None:
        if method == "GET":
            store.client.delete_object(Bucket=BUCKET, Key="going/x")

    with FaultProxy(store.port, choose=choose) as proxy:
        here(proxy.url)
        with pytest.raises(FileNotFoundError):
            fs.read_bytes(f"s3://{BUCKET}/going/x")


READ = """
import json, sys
from stego_core.storage import fs
files = list(fs.list_files(sys.argv[1]))
print(json.dumps([len(files), len(fs.read_bytes(files[3].uri))]))
"""
PROFILES = """
[default]
aws_access_key_id = AKIAOFNOBODY00000001
aws_secret_access_key = of/nobody
[{heading}]
aws_access_key_id = {key_id}
aws_secret_access_key = {secret}
"""


@pytest.mark.parametrize(
    ("variable", "heading"),
    [
        ("AWS_SHARED_CREDENTIALS_FILE", "pictures"),
        ("AWS_CONFIG_FILE", "profile pictures"),
    ],
)
def test_the_keys_of_a_named_profile_list_and_read_a_bucket(
    variable: str, heading: str, store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "profiles"
    path.write_text(PROFILES.format(heading=heading, key_id=KEY_ID, secret=SECRET))
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    env |= store.where | {"AWS_EC2_METADATA_DISABLED": "true", "PYTHONPATH": str(ROOT)}
    # The files of whoever runs this are none of its business.
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        env[name] = str(tmp_path / "none")
    env |= {variable: str(path), "AWS_PROFILE": "pictures"}
    # A process of its own: boto3 and the other client keep what they found first.
    command = [sys.executable, "-c", READ, f"s3://{BUCKET}/{FOLDER}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [12, len(store.read(PICTURE))]


@pytest.mark.parametrize("bucket", [OPEN_BUCKET, BUCKET])
def test_an_open_bucket_is_listed_and_read_without_keys_and_another_one_is_not(
    bucket: str, store: Store, tmp_path: Path
) -> None:
    existing = [one["Name"] for one in store.client.list_buckets()["Buckets"]]
    if OPEN_BUCKET not in existing:
        store.client.create_bucket(Bucket=OPEN_BUCKET)
    for key in store.keys(FOLDER):
        store.client.put_object(Bucket=OPEN_BUCKET, Key=key, Body=store.read(key))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    environment |= store.where | {"STEGO_S3_ANONYMOUS": "1", "HOME": str(tmp_path)}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", READ, f"s3://{bucket}/{FOLDER}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if bucket == OPEN_BUCKET:
        assert json.loads(done.stdout) == [12, len(store.read(PICTURE))], done.stderr
    else:
        assert "AccessDenied" in done.stderr

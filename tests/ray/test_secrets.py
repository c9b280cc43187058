"""Planted credentials appear in nothing that a run leaves: outputs, logs, Ray's session, dashboard.

All are used: the nodes have temporary keys with a session token in their environment, as a role
gives them, and drivers have lasting keys there or a profile with keys of its own. Everything is
searched for their text: the terminal, every file of the runs and of Ray's session folder, every
object of the bucket, and what the dashboard's interface tells.
"""

from __future__ import annotations

import io
import json
import shutil
import stat
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray_cluster import SEGMENT, Cluster, free_ports, ray_head
from s3_store import (
    BUCKET,
    KEY_ID,
    PROFILE_KEY_ID,
    PROFILE_SECRET,
    SECRET,
    Store,
    needs_server,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.s3,
    pytest.mark.slow,  # eight jobs on a cluster and a server of its own
    needs_server,
]
RAY_TOKEN = "planted0ray0token0planted0ray0to"
URI_SECRET = "planted-uri-secret-0001"
PROFILE = f"""
[planted]
aws_access_key_id = {PROFILE_KEY_ID}
aws_secret_access_key = {PROFILE_SECRET}
"""
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@dataclass(frozen=True)
class Guarded:
    """A cluster with a token, credentials and a dashboard.

    Its environment is that of a driver with keys.
    """

    cluster: Cluster
    session: Path  # Ray's folder
    secrets: tuple[str, ...]

    def with_profile(self) -> Cluster:
        """The same for a driver that has a profile and no keys in its environment."""
        env = {name: value for name, value in self.cluster.env.items() if name not in KEYS}
        return replace(self.cluster, env=env | {"AWS_PROFILE": "planted"})

    def found_in(self, data: bytes, where: str) -> list[str]:
        return [f"{secret} in {where}" for secret in self.secrets if secret.encode() in data]

    def found_in_folder(self, folder: Path) -> list[str]:
        found, looked = [], 0
        for path in folder.rglob("*"):
            if stat.S_ISREG(path.lstat().st_mode):
                found += self.found_in(path.read_bytes(), str(path))
                looked += 1
        assert looked, folder
        return found


@pytest.fixture(scope="module")
def guarded(
    store: Store,
    cluster: Cluster,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    profile = folder / "credentials"
    profile.write_text(PROFILE)
    env = {name: value for name, value in cluster.env.items() if name != "RAY_ADDRESS"}
    env |= store.where
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": RAY_TOKEN}
    env |= {"AWS_SHARED_CREDENTIALS_FILE": str(profile)}
    of_nodes = store.temporary_credentials()
    planted = (SECRET, PROFILE_SECRET, RAY_TOKEN, URI_SECRET, *(of_nodes[k] for k in KEYS[1:]))
    (port,) = free_ports(1)
    flags = ["--num-cpus=2", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    # Sockets below it must have short names.
    session = Path(tempfile.mkdtemp(prefix="stego-", dir="/tmp"))
    try:
        head = ray_head(
            cluster.folder,
            "ray-guarded.log",
            env | of_nodes,
            *flags,
            ready_port=port,
            session=session,
        )
        with head as address:
            dashboard = f"http://127.0.0.1:{port}"
            env |= store.credentials | {"RAY_ADDRESS": address}
            yield Guarded(Cluster(address, dashboard, folder, env), session, planted)
    finally:
        shutil.rmtree(session, ignore_errors=True)


def ask(cluster: Cluster, path: str) -> bytes:
    request = urllib.request.Request(f"{cluster.dashboard}{path}")
    request.add_header("Authorization", f"Bearer {RAY_TOKEN}")
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.read()
    except urllib.error.HTTPError as error:
        return error.read()


def test_planted_credentials_appear_nowhere(
    guarded: Guarded,
    store: Store,
    model: Path,
    tmp_path: Path,
) -> None:
    cluster, session, found_in = guarded.cluster, guarded.session, guarded.found_in
    source, out = f"s3://{BUCKET}/data/imgs/val", f"s3://{BUCKET}/secrets/out"
    job = ["segment_bucket.py", "--model", str(model), *SEGMENT]
    bad = f"s3://{KEY_ID}:{URI_SECRET}@{BUCKET}/x"
    (tmp_path / "bad.toml").write_text(f'input = "{bad}"\n')
    said = [
        cluster.run("doctor.py", "--input", source, "--out", out, "--json", "doctor.json"),
        cluster.run(*job, "--input", source, "--out", out, "--debug"),
        guarded.with_profile().run(*job, "--input", source, "--out", f"{out}-profile", "--debug"),
        # And what goes wrong: credentials in a URI or a file, a missing bucket, wrong keys.
        cluster.run(*job, "--input", bad, "--out", str(tmp_path / "a"), check=2),
        cluster.run(*job, "--input", source, "--out", f"{bad}/out", check=2),
        cluster.run(*job, "--config", str(tmp_path / "bad.toml"), check=2),
        cluster.run("doctor.py", "--input", bad, check=2),
        cluster.run(*job, "--input", "s3://none/x", "--out", str(tmp_path / "b"), check=3),
    ]
    found = [one for done in said for one in found_in((done.stdout + done.stderr).encode(), "said")]
    (tmp_path / "bad.toml").unlink()
    for folder in (tmp_path, session, cluster.folder / "doctor.json"):
        if folder.is_dir():
            found += guarded.found_in_folder(folder)
        else:
            found += found_in(folder.read_bytes(), str(folder))
    for key in sorted(store.keys("secrets/")):
        content = store.read(key)
        found += found_in(content, key)
        if key.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(content))
            found += found_in(f"{table.schema.metadata} {table.to_pylist()}".encode(), key)
    # An error page is looked at like an answer: it may tell as much.
    for path in ("/api/jobs/", "/nodes?view=details", "/logical/actors", "/api/v0/tasks"):
        content = ask(cluster, path)
        assert content, path
        found += found_in(content, path)
    assert isinstance(json.loads(ask(cluster, "/api/jobs/")), list)
    assert found == []
    # The search looks where things are: names that are no secret are found.
    assert source.encode() in store.read("secrets/out/config.resolved.toml")
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/", timeout=30)
    left = store.keys("secrets/out/doctor-")
    assert left == []


def test_the_doctor_tells_a_wrong_bucket_from_wrong_keys(
    guarded: Guarded,
) -> None:
    cluster = guarded.cluster
    cases = [
        ("s3://no-such-bucket/x", {}),
        (f"s3://{BUCKET}/data", {"AWS_SECRET_ACCESS_KEY": "wrong"}),
    ]
    texts = []
    for uri, env in cases:
        here = Cluster("", "", cluster.folder, cluster.env | env | {"RAY_ADDRESS": "local"})
        done = here.run("doctor.py", "--input", uri, "--out", uri, check=3)
        lines = {line.split()[1]: line for line in done.stdout.splitlines()}
        assert lines["clock"].startswith("ok"), done.stdout
        assert lines["input"].startswith("fail"), done.stdout
        assert uri in lines["input"]
        texts.append(lines["input"].replace(uri, ""))
        if env:  # this server makes a bucket that is written to
            assert lines["out"].startswith("fail"), done.stdout
    assert len(set(texts)) == 2

"""A store that fails now and then, or is away for a while, costs time and no row."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fault_proxy import FAULTS, FaultProxy
from ray_cluster import SEGMENT, TRAIN, Cluster
from s3_store import BUCKET, Store, needs_server

from stego_core.errors import CheckpointError
from stego_core.storage.lease import hold

pytestmark = [pytest.mark.ray, pytest.mark.s3, needs_server]


def behind(proxy: FaultProxy, cluster: Cluster) -> Cluster:
    return replace(cluster, env=cluster.env | {"AWS_ENDPOINT_URL": proxy.url})


def command(model: Path, out: str) -> list[str]:
    where = ["--input", f"s3://{BUCKET}/data/imgs/train", "--out", f"s3://{BUCKET}/{out}"]
    return ["segment_bucket.py", *where, "--model", str(model), *SEGMENT]


@pytest.fixture(scope="module")
def calm(store: Store, s3_cluster: Cluster, model: Path) -> dict[str, bytes]:
    s3_cluster.run(*command(model, "calm"))
    return masks(store, "calm")


def masks(store: Store, out: str) -> dict[str, bytes]:
    keys = store.keys(f"{out}/masks/")
    return {key.removeprefix(f"{out}/"): store.read(key) for key in keys}


def server_port(store: Store) -> int:
    port = urlsplit(store.where["AWS_ENDPOINT_URL"]).port
    assert port is not None
    return port


@pytest.mark.parametrize(
    "rate",
    [
        pytest.param(0.01, marks=pytest.mark.slow),
        pytest.param(0.1, marks=pytest.mark.slow),
        0.3,
    ],
)
def test_a_share_of_failing_requests_changes_no_byte(
    rate: float, calm: dict[str, bytes], store: Store, s3_cluster: Cluster, model: Path
) -> None:
    out = f"faults-{100 * rate:g}"
    with FaultProxy(server_port(store), rate=rate) as proxy:
        behind(proxy, s3_cluster).run(*command(model, out))
    assert masks(store, out) == calm
    assert store.keys(f"{out}/_SUCCESS")
    share = sum(proxy.faults.values()) / proxy.requests
    assert proxy.requests > 100
    assert 0 < share < 2 * rate + 0.02
    if rate == 0.3:
        assert set(proxy.faults) == set(FAULTS)


def test_a_store_that_is_away_for_a_while_is_waited_for(
    calm: dict[str, bytes], store: Store, s3_cluster: Cluster, model: Path
) -> None:
    with FaultProxy(server_port(store), rate=0) as proxy:

        def go_away() -> None:
            while not store.keys("away/manifest.parquet"):
                time.sleep(0.05)
            proxy.is_down = True
            time.sleep(8)
            proxy.is_down = False

        thread = threading.Thread(target=go_away, daemon=True)
        thread.start()
        behind(proxy, s3_cluster).run(*command(model, "away"))
        thread.join()
    assert masks(store, "away") == calm
    assert proxy.faults["down"] > 0


@pytest.mark.slow
def test_a_training_waits_for_a_bucket_that_is_away_for_a_minute(
    store: Store, s3_cluster: Cluster, model: Path
) -> None:
    root, out = f"s3://{BUCKET}/data", f"s3://{BUCKET}/train-away"
    job = ["train.py", "--data.root", root, "--out", out, *TRAIN]
    downs = {}
    with FaultProxy(server_port(store), rate=0) as proxy:

        def go_away(prefix: str, seconds: float) -> None:
            while not store.keys(f"train-away/{prefix}"):
                time.sleep(0.05)
            proxy.is_down = True
            time.sleep(seconds)
            proxy.is_down = False
            downs[prefix] = proxy.faults["down"]

        def go_away_twice() -> None:
            go_away("features/", 20)
            go_away("checkpoints/", 60)

        thread = threading.Thread(target=go_away_twice, daemon=True)
        thread.start()
        behind(proxy, s3_cluster).run(*job)
        thread.join()
    assert 0 < downs["features/"] < downs["checkpoints/"]
    expected = (model / "model" / "model.safetensors").read_bytes()
    assert store.read("train-away/model/model.safetensors") == expected


def test_the_lease_of_a_bucket_lets_one_job_in(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (store.where | store.credentials).items():
        monkeypatch.setenv(name, value)
    uri, key = f"s3://{BUCKET}/leased", "leased/_owner.json"
    with hold(uri, beat_s=0.2) as lease:
        with pytest.raises(CheckpointError, match="another job"), hold(uri, beat_s=0.2):
            pass
        lease.check()
    assert not store.keys(key)
    store.client.put_object(Bucket=BUCKET, Key=key, Body=b'{"host": "dead", "pid": 1}')
    with hold(uri, beat_s=0.2) as lease:
        store.client.put_object(Bucket=BUCKET, Key=key, Body=b'{"host": "quicker"}')
        while not lease.is_lost:
            time.sleep(0.1)
    assert store.read(key) == b'{"host": "quicker"}'


def test_the_lease_of_a_bucket_outlives_beats_that_do_not_reach_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, key = f"s3://{BUCKET}/away", "away/_owner.json"

    def beat() -> int:
        count = json.loads(store.read(key))["beat"]
        assert isinstance(count, int)
        return count

    with FaultProxy(server_port(store), rate=0) as proxy:
        settings = store.where | store.credentials | {"AWS_ENDPOINT_URL": proxy.url}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with hold(uri, beat_s=0.2) as lease:
            proxy.is_down = True
            while proxy.faults["down"] < 3:
                time.sleep(0.05)
            proxy.is_down = False
            seen = beat()
            while beat() < seen + 2:
                assert not lease.is_lost
                time.sleep(0.05)

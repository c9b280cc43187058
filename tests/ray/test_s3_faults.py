"""A store that fails now and then, or is away for a while, costs time and no row."""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

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
    """Masks of an undisturbed run."""
    s3_cluster.run(*command(model, "calm"))
    found = masks(store, "calm")
    assert found
    return found


def masks(store: Store, out: str) -> dict[str, bytes]:
    """The bytes of every file of masks, by name."""
    keys = store.keys(f"{out}/masks/")
    return {key.removeprefix(f"{out}/"): store.read(key) for key in keys}


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
    with FaultProxy(store.port, rate=rate) as proxy:
        behind(proxy, s3_cluster).run(*command(model, out))
    assert masks(store, out) == calm
    assert store.keys(f"{out}/_SUCCESS")
    share = sum(proxy.faults.values()) / proxy.requests
    assert proxy.requests > 100
    assert 0 < share < 2 * rate + 0.02
    if rate == 0.3:
        assert set(proxy.faults) == set(FAULTS)


@pytest.mark.parametrize("seconds", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_a_store_that_is_away_for_a_while_is_waited_for(
    seconds: int, calm: dict[str, bytes], store: Store, s3_cluster: Cluster, model: Path
) -> None:
    out = f"away-{seconds}"
    with FaultProxy(store.port) as proxy:

        def go_away() -> None:
            while not store.keys(f"{out}/manifest.parquet"):
                time.sleep(0.05)
            proxy.is_down = True
            time.sleep(seconds)
            while not proxy.faults["down"]:  # the job may be starting Ray, and want nothing
                time.sleep(0.05)
            proxy.is_down = False

        thread = threading.Thread(target=go_away, daemon=True)
        thread.start()
        behind(proxy, s3_cluster).run(*command(model, out))
        thread.join()
    assert masks(store, out) == calm
    assert store.keys(f"{out}/_SUCCESS")
    assert proxy.faults["down"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("away_s", "there_s", "wanted"),
    # What is asked for again after a minute is asked for every quarter of a minute.
    [((1, 6), (0.5, 6), 12), ((60, 60), (16, 30), 8)],
    ids=["seconds", "minutes"],
)
def test_a_store_that_is_away_again_and_again_is_waited_for(
    away_s: tuple[float, float],
    there_s: tuple[float, float],
    wanted: int,
    calm: dict[str, bytes],
    store: Store,
    s3_cluster: Cluster,
    model: Path,
) -> None:
    """Outages at drawn moments, one after the other, in as many jobs as it takes to meet some."""
    rng, met = random.Random(5), 0
    for start in range(20):
        out, ended = f"often-{wanted}-{start}", threading.Event()
        with FaultProxy(store.port) as proxy:

            def come_and_go(proxy: FaultProxy = proxy, ended: threading.Event = ended) -> None:
                nonlocal met
                while not ended.wait(rng.uniform(*there_s)):
                    before, proxy.is_down = proxy.faults["down"], True
                    ended.wait(rng.uniform(*away_s))
                    proxy.is_down = False
                    met += proxy.faults["down"] > before

            thread = threading.Thread(target=come_and_go, daemon=True)
            thread.start()
            try:
                behind(proxy, s3_cluster).run(*command(model, out), timeout=1200)
            finally:
                ended.set()
                thread.join()
        assert masks(store, out) == calm
        assert store.keys(f"{out}/_SUCCESS")
        if met >= wanted:
            break
    assert met >= wanted


@pytest.mark.parametrize(
    "kinds",
    [
        {"picture-005.png": "denied"},
        pytest.param(
            {"picture-005.png": "denied", "picture-021.png": "slow_down"},
            marks=pytest.mark.slow,  # what may pass is asked for for two and a half minutes
        ),
    ],
    ids=["refused", "failing"],
)
def test_objects_that_can_not_be_read_are_quarantined_each_with_its_reason(
    kinds: dict[str, str], store: Store, s3_cluster: Cluster, model: Path
) -> None:
    source, out, gone = f"some-{len(kinds)}", f"some-{len(kinds)}-out", "picture-033.png"
    for key in store.keys("data/imgs/train/"):
        store.client.put_object(
            Bucket=BUCKET, Key=f"{source}/{Path(key).name}", Body=store.read(key)
        )

    def choose(method: str, path: str) -> str | None:
        name = Path(path).name
        if name == gone:  # it was listed, and is about to be read
            store.client.delete_object(Bucket=BUCKET, Key=f"{source}/{gone}")
        return kinds.get(name)

    with FaultProxy(store.port, choose=choose) as proxy:
        where = ["--input", f"s3://{BUCKET}/{source}", "--out", f"s3://{BUCKET}/{out}"]
        job = ["segment_bucket.py", *where, "--model", str(model), *SEGMENT]
        behind(proxy, s3_cluster).run(*job)
    reasons = {"denied": "read_denied", "slow_down": "read_failed"}
    expected = {name: reasons[kind] for name, kind in kinds.items()} | {gone: "vanished"}
    rows = statuses(store, f"{out}/masks/")
    assert len(rows) == 40
    assert [(name, status) for name, status in rows if status != "ok"] == sorted(expected.items())
    assert statuses(store, f"{out}/quarantine.parquet", "reason") == sorted(expected.items())
    status = json.loads(store.read(f"{out}/status.json"))
    assert (status["state"], status["exit_code"]) == ("done", 0)
    # When the cause is mended, the same command with --retry makes the output whole.
    store.client.put_object(
        Bucket=BUCKET, Key=f"{source}/{gone}", Body=store.read(f"data/imgs/train/{gone}")
    )
    s3_cluster.run(*job, "--retry")
    assert {status for _, status in statuses(store, f"{out}/masks/")} == {"ok"}
    assert len(statuses(store, f"{out}/masks/")) == 40
    assert statuses(store, f"{out}/quarantine.parquet", "reason") == []


def statuses(store: Store, prefix: str, column: str = "status") -> list[tuple[str, str]]:
    """Names of pictures and what became of them, in order."""
    rows = store.table(prefix).select(["image_uri", column]).to_pylist()
    return sorted((Path(row["image_uri"]).name, row[column]) for row in rows)


@pytest.mark.slow
def test_a_training_waits_for_a_bucket_that_is_away_for_a_minute(
    store: Store, s3_cluster: Cluster, model: Path
) -> None:
    root, out = f"s3://{BUCKET}/data", f"s3://{BUCKET}/train-away"
    job = ["train.py", "--data.root", root, "--out", out, *TRAIN]
    downs = {}
    with FaultProxy(store.port) as proxy:

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
        # It looks for longer than a busy machine keeps a thread from its beat.
        with pytest.raises(CheckpointError, match="another job"), hold(uri, beat_s=2):
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

    with FaultProxy(store.port) as proxy:
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

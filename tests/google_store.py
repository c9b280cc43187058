"""A server on loopback that speaks as Google's storage does, without its authentication."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_cluster import free_ports

SERVER = Path(sys.executable).parent / "gcp-storage-emulator"
needs_google = pytest.mark.skipif(
    not SERVER.exists(), reason="the server (gcp-storage-emulator) is not installed"
)
GOOGLE_BUCKET = "pictures"


@pytest.fixture(scope="session")
def google_store() -> Iterator[dict[str, str]]:
    """Environment that leads to a server with an empty bucket."""
    (port,) = free_ports(1)
    command = [str(SERVER), "start", f"--port={port}", "--host=127.0.0.1", "--in-memory", "--quiet"]
    server = subprocess.Popen([*command, f"--default-bucket={GOOGLE_BUCKET}"])
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            assert server.poll() is None
            try:
                urllib.request.urlopen(f"{url}/storage/v1/b/{GOOGLE_BUCKET}", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            raise TimeoutError("the server does not answer")
        yield {"STORAGE_EMULATOR_HOST": url}
    finally:
        server.kill()
        server.wait()

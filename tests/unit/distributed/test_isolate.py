"""The child that decodes: what it returns, what becomes of it, and what it may use."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from factories import picture, png_bytes

from stego_core.config.schema import ImageLimits
from stego_core.distributed import isolate
from stego_core.distributed.fetch import WholeImage, fetch_unit
from stego_core.distributed.isolate import ChildDecoder, TimeLimit
from stego_core.errors import InputError
from stego_core.storage.manifest import list_images, write_manifest

ROOT = str(Path(__file__).parents[3])


def answer(data, image_id):
    """What the children of these tests run."""
    if data == b"die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"hang":
        time.sleep(3600)
    if data == b"hoard":
        np.ones(10**9)
    return {"status": "ok", "detail": f"{image_id} {os.getpid()}", "pixels": data[::-1]}


@pytest.fixture
def child():
    decoder = ChildDecoder(answer, ImageLimits(max_pixels=10**6, max_bytes=10**6))
    yield decoder
    decoder.close()


def test_a_death_and_a_hang_have_a_status_each_and_the_next_picture_is_decoded(child):
    first = child(b"abc", 2**62)
    assert first["pixels"] == b"cba"
    number, pid = first["detail"].split()
    assert (number, pid) == (str(2**62), child(b"", 1)["detail"].split()[1])
    assert int(pid) != os.getpid()
    dead = child(b"die", 3)
    assert (dead["status"], dead["detail"]) == (
        "crashed",
        "the process that decoded it ended: SIGSEGV",
    )
    hasty = ChildDecoder(answer, ImageLimits(max_seconds=0.3))
    hasty._child = child._child  # a limit for this one alone: the others may wait for a processor
    late = hasty(b"hang", 4)
    assert (late["status"], late["detail"]) == ("timed_out", "decoding took more than 0.3 s")
    assert child(b"xy", 5)["pixels"] == b"yx"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux only")
def test_memory_beyond_the_limits_is_not_to_be_had():
    # 8 GB are asked for; 24 bytes for each pixel that is allowed are there.
    child = ChildDecoder(answer, ImageLimits(max_pixels=10**6, max_bytes=10**6))
    failed = child(b"hoard", 1)
    assert (failed["status"], failed["detail"].endswith("exit code 1")) == ("crashed", True)
    child.close()


def test_both_ways_to_fetch_give_the_same_table(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png_bytes(picture(seed=number)))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    manifest = write_manifest(str(tmp_path / "m"), list_images(str(tmp_path)), unit_images=8)
    settings = {
        "manifest": manifest,
        "prepare": WholeImage(resolution=32, patch=8),
        "limits": ImageLimits(),
    }
    fast = fetch_unit(0, **settings)
    assert fetch_unit(0, deaths=1, **settings) == fast
    assert sorted(fast["status"].to_pylist()) == ["not_an_image", "ok", "ok", "ok"]


def test_a_folder_that_a_node_does_not_see_is_no_matter_of_its_images(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    (root / "0.png").write_bytes(png_bytes(picture()))
    manifest = write_manifest(str(tmp_path / "m"), list_images(str(root)), unit_images=8)
    settings = {
        "manifest": manifest,
        "prepare": WholeImage(resolution=32, patch=8),
        "limits": ImageLimits(),
        "root": str(root),
    }
    assert fetch_unit(0, **settings)["status"].to_pylist() == ["ok"]
    (root / "0.png").unlink()
    assert fetch_unit(0, **settings)["status"].to_pylist() == ["vanished"]
    root.rmdir()
    with pytest.raises(InputError, match=r"is not there on .*: put the images where all nodes"):
        fetch_unit(0, **settings)


def test_a_process_that_gets_nowhere_with_a_picture_ends():
    code = (
        "import sys, time\nfrom stego_core.distributed.isolate import TimeLimit\n"
        "limit = TimeLimit(2)\nfor _ in range(4):\n    with limit.running():\n        pass\n"
        "time.sleep(3)\nprint('reads may take longer', flush=True)\n"
        "with limit.running():\n    time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGALRM
    assert ended.stdout == "reads may take longer\n"


def test_the_timer_is_off_when_no_picture_is_decoded():
    limit = TimeLimit(1000)
    with limit.running():
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_child_ends_with_its_parent_also_while_it_is_at_work(tmp_path):
    note = tmp_path / "pid"
    code = (
        "import os, threading, time\nfrom ray import cloudpickle\n"
        "from stego_core.child import Child\n"
        "def start():\n"
        "    def answer(request):\n"
        f"        open({str(note)!r}, 'w').write(str(os.getpid()))\n"
        "        time.sleep(3600)\n"
        "    return answer\n"
        "if __name__ == '__main__':\n"
        "    threading.Timer(60, os._exit, (1,)).start()\n"
        "    Child(start, dumps=cloudpickle.dumps)(b'', seconds=3600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": ROOT})
    while not (note.exists() and note.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    child = int(note.read_text())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child lives on")


@pytest.mark.parametrize(
    ("left", "share", "expected"),
    [
        (None, 0.5, 24 * 10**8 + 2 * 10**8),  # what the limits state
        (2 * 10**12, 0.5, 24 * 10**8 + 2 * 10**8),
        (2 * 10**9, 0.5, 10**9),
        (3 * 10**9, 1 / 3, 10**9),
        (10**6, 0.5, 256 * 2**20),
    ],
)
def test_a_child_that_decodes_gets_a_share_of_the_memory_that_is_left(
    left, share, expected, monkeypatch
):
    monkeypatch.setattr(isolate, "available_memory", lambda: left)
    child = ChildDecoder(answer, ImageLimits(max_pixels=10**8, max_bytes=10**8), share=share)
    assert child._memory() == expected

"""Peak memory of segment_bucket on 10 000 images beside its peak on 1 000.

All processes of the job together: driver, Ray's own and its workers, as the sum of their
proportional set sizes (shared pages count once), as Linux tells it. The network is timm's smallest
with random weights, so that what grows with the number of images stands out; decoded, all pictures
are 2 GB, so that it would show if decoding ran ahead of the network.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.common import ROOT, Options, Row, run
from stego_core.config.method import HeadConfig
from stego_core.config.schema import BackboneConfig
from stego_core.model.backbone import load_backbone
from stego_core.model.segmenter import model_card, save_segmenter

_FEW, _MANY = 1_000, 10_000
_SIDE, _CLUSTERS, _CODE = 256, 9, 6
_EVERY_S = 0.5


def write_images(folder: Path, count: int) -> None:
    """Write JPEGs of smooth noise, each another one."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        colours = generator.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(colours).resize((_SIDE, _SIDE)).save(folder / f"{index:06d}.jpg")


def write_model(folder: str) -> None:
    """Write a model with random weights."""
    config = BackboneConfig(name="test_vit", weights="random")
    backbone = load_backbone(config)
    head = HeadConfig(kind="linear", dim=_CODE, whiten=0)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "head.linear.weight": torch.randn(_CODE, backbone.width, 1, 1, generator=generator),
        "head.linear.bias": torch.zeros(_CODE),
        "clusters": torch.randn(_CLUSTERS, _CODE, generator=generator),
    }
    names = [f"cluster {number}" for number in range(_CLUSTERS)]
    card = model_card(weights=backbone.weights, config=config, head=head, cluster_names=names)
    save_segmenter(folder, tensors, card)


def peak_bytes(command: list[str]) -> int:
    """Run a command; return the greatest memory of it and all its descendants together."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, sum(pss_bytes(pid) for pid in family(process.pid)))
            time.sleep(_EVERY_S)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak


def family(pid: int) -> set[int]:
    """Return a process and all its descendants."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            # The name, in brackets, may hold anything; the parent is the second word after it.
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, new = {pid}, {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def pss_bytes(pid: int) -> int:
    """Return the proportional set size of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended since
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure(options: Options) -> list[Row]:
    """Return the row; a pair takes minutes, so there are at most two repeats."""
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(f"{folder}/model")
        write_images(Path(folder, "images"), _MANY)
        for repeat in range(min(options.repeats, 2)):
            pair = []
            for count in (_FEW, _MANY):
                command = [sys.executable, str(ROOT / "jobs" / "segment_bucket.py")]
                command += ["--input", f"{folder}/images", "--limit", str(count)]
                command += ["--model", f"{folder}/model", "--out", f"{folder}/out-{repeat}-{count}"]
                command += ["--predict.resolution", str(_SIDE)]
                pair.append(peak_bytes(command))
            pairs.append(pair)
    return [
        Row(
            f"peak memory of segment_bucket at {_MANY:,} images",
            f"at {_FEW:,}",
            1.1,
            [many / few for few, many in pairs],
            direction="at most",
            facts={"peak_gib": [[round(value / 2**30, 3) for value in pair] for pair in pairs]},
        )
    ]


if __name__ == "__main__":
    run("memory", __doc__, measure)

"""The backbone compiled, and with channels last, beside the same as it is; one thread, bf16.

`torch.compile` runs in a process of its own that is ended after three minutes: it needs a C++
compiler and compiles anew for every shape. All see one shape here, the best case for it. Not part
of the table: these decide what is built in, once (docs/performance.md).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

import torch

from benchmarks.common import ROOT, Options, Row, run, seconds
from stego_core.config.schema import BackboneConfig
from stego_core.model.backbone import Backbone, load_backbone

_BATCH, _HEIGHT, _WIDTH = 8, 266, 392  # a photograph at 320 x 320 pixels of area
_LIMIT_S = 180
_COMPILED, _CHANNELS_LAST = "torch.compile", "channels last"


def images() -> torch.Tensor:
    """Return a batch as the jobs compute them."""
    generator = torch.Generator().manual_seed(0)
    shape = (_BATCH, _HEIGHT, _WIDTH, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def formed(form: str) -> tuple[Backbone, torch.Tensor]:
    """Return the backbone in a form, and a batch for it."""
    backbone = load_backbone(BackboneConfig(name="dinov2-vits14", precision="bf16"))
    batch = backbone.prepare(images())
    network = backbone.get_submodule("_network")
    if form == _CHANNELS_LAST:
        network.to(memory_format=torch.channels_last)
        batch = batch.contiguous(memory_format=torch.channels_last)
    if form == _COMPILED:
        method = "forward_intermediates"
        setattr(network, method, torch.compile(getattr(network, method)))
    return backbone, batch


def _cpu_seconds(backbone: Backbone, batch: torch.Tensor) -> float:
    started_s = time.process_time()
    backbone(batch)
    return time.process_time() - started_s


def compare(form: str, repeats: int) -> dict[str, object]:
    """Return the CPU seconds of plain and other form in turns, and how their features differ.

    Of one thread, CPU time is what it takes where nothing else runs; other processes disturb less.
    """
    torch.set_num_threads(1)
    (plain, batch), (other, other_batch) = formed(""), formed(form)
    with torch.inference_mode():
        expected = plain(batch)
        first_s = seconds(lambda: other(other_batch))
        found = other(other_batch)
        pairs = [
            (_cpu_seconds(plain, batch), _cpu_seconds(other, other_batch)) for _ in range(repeats)
        ]
        is_repeatable = torch.equal(found, other(other_batch))
    return {
        "pairs_cpu_s": pairs,
        "first_call_s": round(first_s, 1),
        "is_same_when_repeated": is_repeatable,
        "values_equal": float((found == expected).double().mean()),
        "largest_difference": float((found - expected).abs().max() / expected.abs().max()),
    }


def _bounded(form: str, repeats: int) -> dict[str, object]:
    """Do `compare` in a process that may be ended; raises what `subprocess.run` does."""
    command = [sys.executable, "-m", "benchmarks.network_forms", "--form", form, str(repeats)]
    done = subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=_LIMIT_S
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(options: Options) -> list[Row]:
    """Return a row for each form that could be measured."""
    rows = []
    for form in (_CHANNELS_LAST, _COMPILED):
        try:
            facts = _bounded(form, 3 * options.repeats)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            print(f"{form}: not measured: {error}")
            continue
        pairs = facts.pop("pairs_cpu_s")
        ratios = [plain / other for plain, other in pairs]  # type: ignore[attr-defined]
        facts["plain_cpu_s"] = round(median(plain for plain, _ in pairs), 3)
        facts |= {"batch": _BATCH, "pixels": [_HEIGHT, _WIDTH], "backbone": "dinov2-vits14, bf16"}
        rows.append(Row(f"backbone with {form}", "the same without", 1.05, ratios, facts=facts))
    return rows


if __name__ == "__main__":
    if "--form" in sys.argv:
        print(json.dumps(compare(sys.argv[2], int(sys.argv[3]))))
    else:
        run("network_forms", __doc__, measure)

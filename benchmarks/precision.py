"""The backbone in bf16 beside the same backbone in fp32.

The same network, batches and threads, one batch per thread as the jobs compute them; both take
turns. bf16 pays where the processor multiplies it: AMX, or AVX512-BF16 at half of AMX's width.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.common import Options, Row, run, seconds
from stego_core.config.schema import BackboneConfig
from stego_core.model.backbone import Backbone, load_backbone

_BATCH, _HEIGHT, _WIDTH = 8, 266, 392  # a photograph at 320 x 320 pixels of area
_BATCHES_PER_THREAD = 2


def compute_seconds(backbone: Backbone, pixels: torch.Tensor, threads: int) -> float:
    """Return the seconds of two batches per thread."""

    def compute(_: int) -> None:
        with torch.inference_mode():
            backbone(backbone.prepare(pixels))

    with ThreadPoolExecutor(threads) as pool:
        return seconds(lambda: list(pool.map(compute, range(_BATCHES_PER_THREAD * threads))))


def measure(options: Options) -> list[Row]:
    """Return the row."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(1)
    sides = [
        load_backbone(BackboneConfig(name="dinov2-vits14", precision=precision))
        for precision in ("fp32", "bf16")
    ]
    generator = torch.Generator().manual_seed(0)
    shape = (_BATCH, _HEIGHT, _WIDTH, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    for side in sides:
        compute_seconds(side, pixels, threads)  # warm
    pairs = [
        (compute_seconds(sides[0], pixels, threads), compute_seconds(sides[1], pixels, threads))
        for _ in range(max(options.repeats, 5))
    ]
    images = _BATCH * _BATCHES_PER_THREAD * threads
    return [
        Row(
            what="backbone in bf16",
            against="the same in fp32",
            bar=2.5,
            note="the bar is AMX's; AVX512-BF16 alone multiplies at most twice as fast as fp32",
            values=[fp32 / bf16 for fp32, bf16 in pairs],
            facts={
                "backbone": "dinov2-vits14",
                "pixels": [_HEIGHT, _WIDTH],
                "batch": _BATCH,
                "threads": threads,
                "fp32_images_per_s": [round(images / fp32, 2) for fp32, _ in pairs],
                "bf16_images_per_s": [round(images / bf16, 2) for _, bf16 in pairs],
            },
        )
    ]


if __name__ == "__main__":
    run("precision", __doc__, measure)

"""Images per second of segment_bucket beside those of the bare backbone, in one run.

Baseline: the same backbone, precision, threads and batches on tensors that were decoded and resized
beforehand, nothing else; the threads share each batch, or take a batch each as the job does,
whichever is faster. Both are measured several times in turn on the same images. Two rates of
the job are given: of its streaming stage (`segment/done` in events.jsonl), whose first unit
waits for actors to start, and of the whole process, start of Ray included.

    python benchmarks/segment_throughput.py --images FOLDER --model RUN [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stego_core.config.schema import ImageLimits, PredictConfig
from stego_core.distributed.fetch import WholeImage
from stego_core.images.decode import ImageFailure, decode_image
from stego_core.model.segmenter import Segmenter, load_segmenter
from stego_core.storage import fs
from stego_core.storage.manifest import list_images


def prepared_batches(images: str, limit: int, segmenter: Segmenter) -> list[torch.Tensor]:
    """Return the decoded, resized images in batches of one shape, as the job makes them."""
    config = PredictConfig()
    prepare = WholeImage(resolution=config.resolution, patch=segmenter.backbone.patch_size)
    shapes: dict[tuple[int, ...], list[np.ndarray]] = {}
    for file in list_images(images, limit=limit):
        image = decode_image(fs.read_bytes(file.uri), ImageLimits())
        if not isinstance(image, ImageFailure):
            pixels = prepare(image)
            shapes.setdefault(pixels.shape, []).append(pixels)
    return [
        torch.from_numpy(np.stack(group[start : start + config.batch]))
        for group in shapes.values()
        for start in range(0, len(group), config.batch)
    ]


def backbone_rate(segmenter: Segmenter, batches: list[torch.Tensor], *, at_a_time: int) -> float:
    """Return images per second of the backbone alone, with `at_a_time` batches at once."""
    torch.set_num_threads((os.cpu_count() or 1) // at_a_time)

    def compute(batch: torch.Tensor) -> None:
        with torch.inference_mode():
            segmenter.backbone(segmenter.backbone.prepare(batch))

    started_s = time.perf_counter()
    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(compute, batches))
    return sum(len(b) for b in batches) / (time.perf_counter() - started_s)


def job_rates(images: str, model: str, limit: int, folder: str) -> dict[str, float]:
    """Return images per second of the job: of its streaming stage, and of the process."""
    command = [sys.executable, str(ROOT / "jobs" / "segment_bucket.py"), "--input", images]
    command += ["--model", model, "--out", folder, "--limit", str(limit)]
    started_s = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, timeout=1800)
    whole_s = time.perf_counter() - started_s
    events = [json.loads(x) for x in Path(folder, "events.jsonl").read_text().splitlines()]
    (done,) = [event for event in events if event["event"] == "segment/done"]
    return {
        "stage": done["images_per_s"],
        "process": done["images"] / whole_s,
    }


def machine() -> dict[str, Any]:
    """Return what a reader has to know of the machine."""
    model = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    """Measure, print a table and write benchmarks/results/segment_throughput.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="runs/demo-images")
    parser.add_argument("--model", default="runs/demo")
    parser.add_argument("--limit", type=int, default=99)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    segmenter = load_segmenter(arguments.model)
    batches = prepared_batches(arguments.images, arguments.limit, segmenter)
    backbone_rate(segmenter, batches[:2], at_a_time=1)  # warm
    layouts: list[list[float]] = []
    jobs: list[dict[str, float]] = []
    for _ in range(arguments.repeats):
        rates = [backbone_rate(segmenter, batches, at_a_time=n) for n in (1, os.cpu_count() or 1)]
        layouts.append(rates)
        with tempfile.TemporaryDirectory() as folder:
            jobs.append(job_rates(arguments.images, arguments.model, arguments.limit, folder))
    bare = [max(rates) for rates in layouts]
    result = {
        "images": sum(len(batch) for batch in batches),
        "resolution": PredictConfig().resolution,
        "precision": segmenter.backbone.precision,
        "repeats": arguments.repeats,
        "images_per_s": {
            "bare_backbone": statistics.median(bare),
            "bare_threads_share_batches": statistics.median(rates[0] for rates in layouts),
            "bare_batch_per_thread": statistics.median(rates[1] for rates in layouts),
            **{kind: statistics.median(rates[kind] for rates in jobs) for kind in jobs[0]},
        },
        "ratio_to_bare": {
            kind: statistics.median(r[kind] / b for r, b in zip(jobs, bare, strict=True))
            for kind in jobs[0]
        },
        "machine": machine(),
    }
    path = ROOT / "benchmarks" / "results" / "segment_throughput.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

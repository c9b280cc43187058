"""Images per second of segment_bucket beside the bare backbone, and of two actors beside one.

Bare: the same backbone, precision and cores on tensors that were decoded and resized beforehand,
nothing else, a batch per thread, in batches of 8 as the job or of 4, whichever is faster. The job's
rate is given twice: the steady one, the slope of images done over time after the first two work
units (`segment/done` in events.jsonl), and that of the whole process, from the start of Python to
its end. Both take turns on the same images.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

import ray

from benchmarks.common import ROOT, Options, Row, run, seconds
from benchmarks.segmentation import (
    CORES,
    backbone_rate,
    done_event,
    gather,
    prepared_batches,
    run_segment,
    segment_job,
)
from stego_core.distributed.cluster import ActorPlan, connect
from stego_core.model.segmenter import load_segmenter

_IMAGES, _ACTOR_IMAGES = 512, 256
_BATCHES = (8, 4)


def measure(options: Options) -> list[Row]:
    """Return the rows."""
    with tempfile.TemporaryDirectory() as folder:
        images = gather(options.images, _IMAGES, folder)
        rows = _beside_bare(options, images, folder)
        some = gather(options.images, _ACTOR_IMAGES, folder)
        return [*rows, _two_actors(options, some, folder)]


def _beside_bare(options: Options, images: str, folder: str) -> list[Row]:
    segmenter = load_segmenter(options.model)
    layouts = [prepared_batches(images, segmenter, size) for size in _BATCHES]
    backbone_rate(segmenter, layouts[0][:2], CORES)  # warm
    bare, steady, stage, process = [], [], [], []
    for repeat in range(options.repeats):
        half = len(layouts[0]) // 2
        bare.append(
            max(
                backbone_rate(segmenter, layouts[0][:half], CORES),
                backbone_rate(segmenter, layouts[1][: 2 * half], CORES),
            )
        )
        out = f"{folder}/masks-{repeat}"
        command = [sys.executable, str(ROOT / "jobs" / "segment_bucket.py"), "--input", images]
        command += ["--model", options.model, "--out", out]
        took_s = seconds(
            lambda command=command: subprocess.run(command, check=True, capture_output=True)
        )
        event = done_event(out)
        steady.append(event["steady_images_per_s"])
        stage.append(event["images_per_s"])
        process.append(event["images"] / took_s)
    facts = {
        "images": _IMAGES,
        "precision": segmenter.backbone.precision,
        "bare_images_per_s": [round(rate, 2) for rate in bare],
        "steady_images_per_s": steady,
        "with_start_of_actors_images_per_s": stage,
        "process_images_per_s": [round(rate, 2) for rate in process],
    }

    def shares(rates: list[float]) -> list[float]:
        return [rate / one for rate, one in zip(rates, bare, strict=True)]

    return [
        Row(
            "segment_bucket through Ray, steady rate",
            "bare backbone loop",
            0.85,
            shares(steady),
            unit="%",
            facts=facts,
        ),
        Row(
            f"segment_bucket, whole process, {_IMAGES} images",
            "bare backbone loop",
            0.85,
            shares(process),
            unit="%",
            facts=facts,
            note="start of Python, Ray and actor weigh less the more images there are",
        ),
    ]


def _two_actors(options: Options, images: str, folder: str) -> Row:
    ratios, rates = [], []
    with connect():
        free = ray.cluster_resources()["CPU"] - 1
        for repeat in range(options.repeats):
            pair = []
            for count in (1, 2):
                plan = ActorPlan(count, num_cpus=free / 2 - 0.01, num_gpus=0, threads=1)
                job = segment_job(images, options.model, f"{folder}/actors-{repeat}-{count}")
                pair.append(float(run_segment(job, plan)["steady_images_per_s"]))
            ratios.append(pair[1] / pair[0])
            rates.append(pair)
    return Row(
        "segment_bucket with two actors of one thread",
        "with one",
        1.8,
        ratios,
        facts={"images": _ACTOR_IMAGES, "steady_images_per_s": rates},
    )


if __name__ == "__main__":
    run("segment_throughput", __doc__, measure)

"""Images per second of segment_bucket beside the bare backbone, and of two actors beside one.

Bare: the same backbone, precision and cores on tensors that were decoded and resized beforehand,
nothing else, a batch per thread, in batches of 8 as the job or of 4, whichever is faster at first.
The job's rate is given twice: the steady one, between the first and the last round of work units
(`segment/done` in events.jsonl), and that of the whole process, from the start of Python to
its end. Both take turns on the same images.

One and two actors have one thread each and the same number of work units each, of half the usual
size, so each count of actors runs as long as the other; the bare loop on one and on two threads
stands beside them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from statistics import median

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
from stego_core.config.schema import LabelMapConfig
from stego_core.distributed.cluster import ActorPlan, connect
from stego_core.model.segmenter import load_segmenter

_IMAGES = 512  # 16 work units
_IMAGES_PER_ACTOR, _ACTORS_UNIT = 192, 16  # 12 work units
_BARE_IMAGES, _ONE_THREAD_IMAGES = 256, 64
_REPEATS = 2  # at most
_BATCHES = (8, 4)


class _Bare:
    """The backbone alone on prepared images of a folder."""

    def __init__(self, model: str, images: str) -> None:
        self._segmenter = load_segmenter(model)
        self.precision = self._segmenter.backbone.precision
        self._layouts = {size: prepared_batches(images, self._segmenter, size) for size in _BATCHES}
        self._faster: dict[int, int] = {}  # batch size by number of threads
        backbone_rate(self._segmenter, self._layouts[_BATCHES[0]][:2], CORES)  # warm

    def rate(self, threads: int, count: int) -> float:
        """Return the images per second of the faster layout, `count` images for each thread."""
        sizes = [self._faster[threads]] if threads in self._faster else _BATCHES
        rates = {}
        for size in sizes:
            layout = self._layouts[size]
            batches = layout[:: max(1, len(layout) * size // count)]  # of all shapes
            rates[size] = backbone_rate(self._segmenter, batches * threads, threads)
        self._faster[threads] = max(rates, key=lambda size: rates[size])
        return rates[self._faster[threads]]


def measure(options: Options) -> list[Row]:
    """Return the rows; a repeat takes minutes, so there are at most two."""
    model, repeats = options.model, min(options.repeats, _REPEATS)
    with tempfile.TemporaryDirectory() as folder:
        images = gather(options.images, _IMAGES, folder)
        inputs = {n: gather(options.images, n * _IMAGES_PER_ACTOR, folder) for n in (1, 2)}
        bare = _Bare(model, inputs[2])
        rows = _beside_bare(model, images, folder, bare, repeats=repeats)
        return [*rows, _two_actors(model, inputs, folder, bare, repeats=repeats)]


def _beside_bare(model: str, images: str, folder: str, bare: _Bare, *, repeats: int) -> list[Row]:
    bare_rates, steady, stage, process = [], [], [], []
    for repeat in range(repeats):
        bare_rates.append(bare.rate(CORES, _BARE_IMAGES // CORES))
        out = f"{folder}/masks-{repeat}"
        command = [sys.executable, str(ROOT / "jobs" / "segment_bucket.py"), "--input", images]
        command += ["--model", model, "--out", out]
        took_s = seconds(
            lambda command=command: subprocess.run(command, check=True, capture_output=True)
        )
        event = done_event(out)
        steady.append(event["steady_images_per_s"])
        stage.append(event["images_per_s"])
        process.append(event["images"] / took_s)
    facts = {
        "images": _IMAGES,
        "precision": bare.precision,
        "bare_images_per_s": [round(rate, 2) for rate in bare_rates],
        "steady_images_per_s": steady,
        "with_start_of_actors_images_per_s": stage,
        "process_images_per_s": [round(rate, 2) for rate in process],
    }

    def shares(rates: list[float]) -> list[float]:
        return [rate / one for rate, one in zip(rates, bare_rates, strict=True)]

    return [
        Row(
            "segment_bucket through Ray, steady rate",
            "bare backbone loop",
            0.85,
            shares(steady),
            unit="%",
            facts=facts,
            note="reading, masks and Ray's processes share the same cores",
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


def _two_actors(
    model: str,
    inputs: dict[int, str],
    folder: str,
    bare: _Bare,
    *,
    repeats: int,
) -> Row:
    """Return the row of two actors beside one; `inputs` has the images for each count."""
    rates: dict[str, list[list[float]]] = {"steady": [], "bare": []}
    with connect():
        free = ray.cluster_resources()["CPU"] - 1
        for repeat in range(repeats):
            rates["bare"].append([bare.rate(count, _ONE_THREAD_IMAGES) for count in inputs])
            rates["steady"].append([])
            for count, images in inputs.items():
                plan = ActorPlan(count, num_cpus=free / 2 - 0.01, num_gpus=0, threads=1)
                out = f"{folder}/actors-{repeat}-{count}"
                predict = LabelMapConfig(unit_images=_ACTORS_UNIT)
                job = segment_job(images, model, out, predict=predict)
                rates["steady"][-1].append(float(run_segment(job, plan)["steady_images_per_s"]))
    ratios = {name: [two / one for one, two in pairs] for name, pairs in rates.items()}
    return Row(
        "segment_bucket with two actors of one thread, steady rate",
        "with one of one thread",
        1.8,
        ratios["steady"],
        facts={
            "images_per_actor": _IMAGES_PER_ACTOR,
            "images_per_unit": _ACTORS_UNIT,
            "steady_images_per_s": rates["steady"],
            "bare_images_per_s_of_one_and_two_threads": rates["bare"],
        },
        note=f"the bare backbone loop: {median(ratios['bare']):.3g} times on two threads",
    )


if __name__ == "__main__":
    run("segment_throughput", __doc__, measure)

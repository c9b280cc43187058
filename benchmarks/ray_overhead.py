"""segment_bucket end to end on 200 images through Ray, beside the same without Ray.

Without Ray: the same job in this process, the same stages on the same units, two units at a time
and as many computing threads, from listing to `_SUCCESS`. Both are warm: packages imported, Ray
running, files in the page cache; each loads the model anew, and Ray starts its actor.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any
from unittest import mock

from benchmarks.common import Options, Row, run, seconds
from benchmarks.segmentation import CORES, gather, run_segment, segment_job
from stego_core.distributed import segment
from stego_core.distributed.cluster import ActorPlan, connect
from stego_core.distributed.units import Stage

_IMAGES = 200
_REPEATS = 2  # at most: each takes a minute
_UNITS_AT_A_TIME = 2


def local_units(
    pending: Callable[[], Sequence[int]],
    *,
    fetch: Stage,
    work: Stage,
    finish: Stage,
    actors: ActorPlan,
    seconds: float,
    debug: bool = False,
) -> Iterator[dict[str, Any]]:
    """Do what `distributed.units.run_units` does, in this process."""
    worker: Callable[..., Any] = work.function(**work.kwargs)

    def one(unit: int) -> dict[str, Any]:
        table = worker(unit, fetch.function(unit, **fetch.kwargs))
        receipt = finish.function(unit, table, **finish.kwargs)["receipt"][0].as_py()
        return dict(json.loads(receipt))

    with ThreadPoolExecutor(_UNITS_AT_A_TIME) as pool:
        yield from pool.map(one, pending())


def without_ray(images: str, model: str, out: str) -> None:
    """Run the job in this process."""
    plan = ActorPlan(1, num_cpus=0, num_gpus=0, threads=CORES)
    with (
        mock.patch.object(segment, "run_units", local_units),
        mock.patch.object(segment, "connect", return_value=nullcontext()),
    ):
        run_segment(segment_job(images, model, out), plan)


def measure(options: Options) -> list[Row]:
    """Return the row."""
    ratios, local_s, ray_s = [], [], []
    with tempfile.TemporaryDirectory() as folder, connect():
        images = gather(options.images, _IMAGES, folder)
        few = gather(options.images, 8, folder)
        without_ray(few, options.model, f"{folder}/warm-local")
        run_segment(segment_job(few, options.model, f"{folder}/warm-ray"))
        for repeat in range(min(options.repeats, _REPEATS)):
            out = f"{folder}/local-{repeat}"
            local_s.append(seconds(lambda out=out: without_ray(images, options.model, out)))
            job = segment_job(images, options.model, f"{folder}/ray-{repeat}")
            ray_s.append(seconds(lambda job=job: run_segment(job)))
            ratios.append(ray_s[-1] / local_s[-1])
    return [
        Row(
            f"segment_bucket on {_IMAGES} images through Ray, end to end",
            "the same without Ray, warm",
            1.25,
            ratios,
            direction="at most",
            facts={
                "without_ray_s": [round(value, 2) for value in local_s],
                "with_ray_s": [round(value, 2) for value in ray_s],
            },
        )
    ]


if __name__ == "__main__":
    run("ray_overhead", __doc__, measure)

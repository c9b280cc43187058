"""What a training takes, for the plan of a dry run: views that are read, and time of a step."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch

from stego_core.config.schema import TrainJob
from stego_core.model.whitening import Whitening
from stego_core.training.calibration import KINDS, VIEWS
from stego_core.training.choose import POINTS
from stego_core.training.maps import TOKENS_PER_VIEW
from stego_core.training.matching import ANCHORS, NEIGHBORS
from stego_core.training.points import has_matches
from stego_core.training.sampler import draw_step
from stego_core.training.state import Optimizers
from stego_core.training.step import StepBatch, Trainable

_LARGEST_BYTES = 2**31  # of a batch of features; the plan of a job is not to take much itself
_STEPS = 3  # the first one is not counted
_JUDGED = 128  # views that a criterion looks at, each with its nearest one
_CONCEPTS = 256
_SHIFT = 0.3  # any; the sums are the same


def seconds_per_step(job: TrainJob, *, width: int, grid: int) -> float | None:
    """Return what a step takes on one thread, as a worker has it, measured on noise.

    Whitening is part of it, as of views that are read for the first time. Reading features is not,
    nor is what needs images or labels.

    Args:
        job: the settings.
        width: C of the features.
        grid: cells along each axis of a feature map.

    Returns:
        Seconds, or None for batches too large to try.
    """
    if 2 * job.train.batch * grid * grid * width * 4 > _LARGEST_BYTES:
        return None
    loss = replace(job.loss, alignment=0.0, crf=0.0, salience=False, oracle=False)
    clusters = replace(job.clusters, count=job.clusters.count or 27)
    job = replace(job, loss=loss, clusters=clusters)
    generator = torch.Generator().manual_seed(0)
    shape = (job.train.batch, grid, grid, width)
    maps = [torch.randn(shape, generator=generator).permute(0, 3, 1, 2) for _ in range(2)]
    whitening = None
    if job.head.whiten:
        projection = torch.randn(min(job.head.whiten, width), width, generator=generator)
        whitening = Whitening(torch.zeros(width), projection)
    channels = width if whitening is None else whitening.width
    shifts = dict.fromkeys(KINDS, _SHIFT)
    concepts = None
    if job.loss.energy == "concept":
        concepts = torch.randn(_CONCEPTS, channels, generator=generator)
    model = Trainable(
        job,
        channels=channels,
        num_classes=0,
        shifts=shifts,
        whitening=whitening,
        concepts=concepts,
    )
    optimizers = Optimizers(model, job.train)
    neighbors_VN = np.roll(np.arange(job.train.batch), 1)[:, None]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for a core which is busy would be counted
    times_s = []
    for step in range(_STEPS):
        started_s = time.process_time()
        draws = draw_step(job, step, neighbors_VN=neighbors_VN, channels=channels)
        with torch.no_grad():
            anchor, neighbor = (model.whiten(one) for one in maps)
        batch = StepBatch(anchor, neighbor, draws, slice(0, job.train.batch), None)
        losses = model(batch)
        optimizers.zero_grad()
        torch.autograd.backward(losses["total"])
        optimizers.step()
        model.follow()
        times_s.append(time.process_time() - started_s)
    torch.set_num_threads(threads)
    return min(times_s[1:])


def views_read(job: TrainJob, num_views: int) -> int:
    """Return about how many times features of a view are read in a training, on all workers.

    What options, and linear probes where there are labels, read beside the default is left out.

    Args:
        job: the settings.
        num_views: of the data.
    """
    steps = 2 * job.train.steps * job.train.batch
    sample = min(num_views, job.clusters.sample // TOKENS_PER_VIEW)
    matched = min(num_views, ANCHORS * (1 + NEIGHBORS))
    is_whitened, is_matched = job.head.whiten > 0, has_matches(job)
    before = 2 * min(num_views, VIEWS) + is_whitened * sample + is_matched * matched
    after = sample + is_matched * matched
    states = 1  # that are fitted
    if job.train.select != "last":
        states += -(-job.train.steps // job.train.checkpoint_every)
        after += 2 * min(num_views, _JUDGED)
    choice = 0
    if job.clusters.count == 0:
        choice = min(num_views, POINTS // TOKENS_PER_VIEW) + is_matched * matched
    return steps + job.workers * before + choice + states * after

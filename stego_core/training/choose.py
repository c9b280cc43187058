"""The number of clusters of a run that was given none."""

from __future__ import annotations

import copy
import dataclasses
import logging

import numpy as np
from torch import Tensor

from stego_core.config.schema import TrainJob
from stego_core.model.checkpoint import load_tensors
from stego_core.model.choose_count import CountChoice, choose_count
from stego_core.model.smoothing import smooth_code
from stego_core.training.loop import TrainContext, TrainData, new_model
from stego_core.training.maps import ModelMaps, sample_tokens
from stego_core.training.points import cluster_points, has_matches
from stego_core.training.views import FeatureSource, Reads, Whitened
from stego_core.training.workers import from_first_worker

logger = logging.getLogger(__name__)

POINTS = 10_000  # enough for 64 clusters; k-means is run for every candidate
_FEWEST_PAIRS = 100  # of matched tokens, whose agreement is a number and not noise


class _Smoothed:
    """Features that are smoothed like the codes of a model."""

    def __init__(self, source: FeatureSource, temperature: float) -> None:
        self._source, self._temperature = source, temperature

    def expect(self, reads: Reads) -> None:
        self._source.expect(reads)

    def read(self, views: np.ndarray) -> Tensor:
        maps = self._source.read(views)
        return smooth_code(maps, maps, temperature=self._temperature)


def with_cluster_count(
    job: TrainJob, data: TrainData, context: TrainContext, *, device: str = "cpu"
) -> TrainJob:
    """Return the job with a number of clusters, chosen without labels where it has none.

    The number has to be known before the first step, so it is chosen on the codes of the head as
    it starts. A run that was interrupted keeps its number, and rank 0 decides for all workers.

    Args:
        job: the configuration.
        data: what will be trained on.
        context: of this worker.
        device: of torch.
    """
    if job.clusters.count:
        return job
    count = from_first_worker(lambda: _decide(job, data, context, device))
    return dataclasses.replace(job, clusters=dataclasses.replace(job.clusters, count=count))


def _decide(job: TrainJob, data: TrainData, context: TrainContext, device: str) -> int:
    folder = context.resume_folder()
    if folder is not None:
        state, _ = load_tensors(folder, "state")
        return len(state["model.cluster_probe.clusters"]) - job.clusters.extra
    name, choice = _choose(job, data, device)
    table = [{"count": count, name: score} for count, score in choice.scores.items()]
    context.event("clusters/count", count=choice.count, candidates=table)
    scores = ", ".join(f"{count}: {score:.3f}" for count, score in choice.scores.items())
    logger.info("clusters: %d chosen by %s (%s)", choice.count, name, scores)
    return choice.count


def _choose(job: TrainJob, data: TrainData, device: str) -> tuple[str, CountChoice]:
    wanted = min(POINTS, job.clusters.sample)
    if has_matches(job):
        # The head starts as the identity, so its codes are what clusters would see without a step.
        one = dataclasses.replace(job, clusters=dataclasses.replace(job.clusters, count=1))
        maps = ModelMaps(one, new_model(one, data).to(device).eval(), data)
        found = cluster_points(one, maps, data, wanted)
        if found.agreement is not None and found.agreement.pairs >= _FEWEST_PAIRS:
            return "agreement", choose_count(
                found.points, seed=job.seed, weights_N=found.weights, agreement=found.agreement
            )
    source = data.features
    if data.whitening is not None:
        # A copy: the model above took the data's own to the device, and features are on the CPU.
        source = Whitened(source, copy.deepcopy(data.whitening).cpu())
    source = _Smoothed(source, job.head.smooth)
    points = sample_tokens(source, len(data.neighbors), wanted, seed=job.seed)
    return "silhouette", choose_count(points, seed=job.seed)

"""Choosing among the states of one training by a criterion that looks at no label.

Each candidate is a model folder of its own below `candidates/` of the run, with its score in
`model.json`. So a killed training knows what it judged, and a user can evaluate every candidate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from stego_core.config.schema import TrainJob
from stego_core.inference.scoring import head_on_features, measure_criteria
from stego_core.model.checkpoint import load_tensors
from stego_core.model.segmenter import save_segmenter
from stego_core.storage import fs
from stego_core.training.fit import fit
from stego_core.training.loop import TrainContext, TrainData
from stego_core.training.refine import refine_clusters
from stego_core.training.step import Trainable

logger = logging.getLogger(__name__)

Fitted = tuple[dict[str, Any], dict[str, Any]]  # tensors and card of a model


def feature_channels(data: TrainData) -> int:
    """Return the channels of the features, before any whitening."""
    return int(data.features.read(np.zeros(1, np.int64)).shape[1])


def judge(
    tensors: dict[str, Any], card: dict[str, Any], data: TrainData, *, seed: int
) -> dict[str, float]:
    """Return every criterion of a fitted model on what it was trained on."""
    head = head_on_features(tensors, card, feature_channels(data))
    source, nearest = data.features, data.neighbors[:, 0]
    found = measure_criteria(head, source.read, nearest, seed=seed, expect=source.expect)
    return {name: round(value, 6) for name, value in found.items()}


def refined(
    job: TrainJob, fitted: Fitted, data: TrainData, context: TrainContext, *, device: str
) -> Fitted:
    """Return a model with clusters refined over all views; called by all workers.

    Args:
        job: the configuration.
        fitted: the same on all workers.
        data: what was trained on.
        context: of this worker.
        device: of torch.
    """
    tensors, card = fitted
    head = head_on_features(tensors, card, feature_channels(data)).to(device)
    clusters = refine_clusters(
        job,
        tensors["clusters"],
        lambda features: head.encode(features.to(device))[1].cpu(),
        data,
        context,
        device=device,
    )
    return {**tensors, "clusters": clusters}, card


class Candidates:
    """The candidates of one training, which `visitor` finds while it trains.

    Args:
        uri: folder of this training's candidates.
        job: the configuration.
        data: what is trained on.
        card: of the model, without its steps.
        context: of the training.
    """

    def __init__(
        self,
        uri: str,
        job: TrainJob,
        data: TrainData,
        card: dict[str, Any],
        context: TrainContext,
    ) -> None:
        self._uri, self._job, self._data = uri, job, data
        self._card, self._context = card, context

    @property
    def visitor(self) -> Callable[[int, Trainable], None] | None:
        """Return what the training calls at its checkpoints; None where nothing is selected."""
        return None if self._job.train.select == "last" else self.visit

    def visit(self, step: int, model: Trainable) -> None:
        """Fit and judge the model after `step` steps, on rank 0: other ranks have the same."""
        if self._context.rank:
            return
        was_training = model.training
        tensors, card = self._fitted(step, model.eval())
        model.train(was_training)
        criteria = judge(tensors, card, self._data, seed=self._job.seed)
        self._context.event("train/candidate", step=step, **criteria)
        save_segmenter(
            fs.join(self._uri, f"step-{step:08d}"), tensors, card | {"criteria": criteria}
        )

    def choose(self, model: Trainable) -> Fitted:
        """Return tensors and card of the best candidate, of equals the one with fewer steps.

        Args:
            model: after the last step; the only candidate where nothing is selected.
        """
        criterion, steps = self._job.train.select, self._job.train.steps
        if criterion == "last":
            return self._fitted(steps, model)
        self.visit(steps, model)
        found = [load_tensors(fs.join(self._uri, name), "model") for name in self._names()]
        tensors, card = max(found, key=lambda pair: float(pair[1]["criteria"][criterion]))
        logger.info(
            "model of step %d: the best of %s by %s",
            card["training"]["steps"],
            ", ".join(str(each["training"]["steps"]) for _, each in found),
            criterion,
        )
        return tensors, card

    def _names(self) -> list[str]:
        return sorted(name for name in fs.list_names(self._uri) if name.startswith("step-"))

    def _fitted(self, step: int, model: Trainable) -> Fitted:
        card = self._card | {"training": self._card["training"] | {"steps": step}}
        return fit(self._job, model, self._data), card

"""The training loop: steps, events, checkpoints. It runs under Ray Train or without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stego_core.config.schema import TrainJob
from stego_core.model.whitening import Whitening
from stego_core.training.kept import SeenFeatures
from stego_core.training.optional import draw_optional, needs_labels, read_optional
from stego_core.training.sampler import StepReads, draw_step
from stego_core.training.state import Optimizers, load_state, save_state
from stego_core.training.step import StepBatch, Trainable
from stego_core.training.views import FeatureSource, FromBackbone, LabelSource

_RESET_STREAM = 6


class TrainContext(Protocol):
    """What the loop needs of its surroundings."""

    @property
    def rank(self) -> int:
        """Return this worker's number."""

    @property
    def num_workers(self) -> int:
        """Return the number of workers that share each batch."""

    def resume_folder(self) -> str | None:
        """Return the folder of the newest checkpoint, if there is one."""

    def checkpoint(self, step: int, save: Callable[[str], None]) -> None:
        """Keep what `save(folder)` writes on rank 0; called by every worker."""

    def event(self, name: str, **values: Any) -> None:
        """Record an event; only rank 0's count."""


@dataclass(frozen=True, slots=True)
class TrainData:
    """What a run trains on.

    Attributes:
        features: of the views.
        neighbors: (V, N) views, -1 where there are fewer.
        channels: C of the features, after whitening if there is one.
        labels: for the linear probe, or None.
        num_classes: of the labels; 0 without.
        side: of a view in pixels.
        shifts: calibrated shifts; empty takes those of the configuration.
        whitening: of the features, or None.
        class_tokens: (V, C) of the views, or None where the backbone has none.
        pixels: of the views, where an optional loss needs them.
        concepts: (M, channels) codebook of features, where the energy needs one.
    """

    features: FeatureSource
    neighbors: np.ndarray
    channels: int
    labels: LabelSource | None
    num_classes: int
    side: int
    shifts: dict[str, float]
    whitening: Whitening | None = None
    class_tokens: np.ndarray | None = None
    pixels: FromBackbone | None = None
    concepts: Tensor | None = None


def train(
    job: TrainJob,
    data: TrainData,
    context: TrainContext,
    *,
    device: str,
    visit: Callable[[int, Trainable], None] | None = None,
) -> Trainable:
    """Train head and probes; return them on every worker.

    Steps are counted in batches. A run that was interrupted continues from its newest checkpoint
    with exactly the batches that would have followed.

    Args:
        job: the configuration.
        data: what is trained on.
        context: of this worker.
        device: of torch.
        visit: called with the steps done and the model before the first step, after each
            checkpoint, and again where an interrupted run continues; not after the last step.
    """
    model = new_model(job, data).to(device)
    optimizers = Optimizers(model, job.train)
    first = 0
    folder = context.resume_folder()
    if folder is not None:
        first = int(load_state(folder, model, optimizers)["step"])
        context.event("train/resumed", step=first, workers=context.num_workers)
    seen = SeenFeatures(data.features, model.whitening, device=device)
    # Only the head and the probes are synchronised; the backbone is frozen and not even here.
    module: nn.Module = model
    if dist.is_initialized() and dist.get_world_size() > 1:
        module = DistributedDataParallel(model)
    model.train()
    started_s = time.monotonic()
    every, steps = job.train.checkpoint_every, job.train.steps
    for step in range(first, steps):
        if visit is not None and step % every == 0:
            visit(step, model)
        if step == first or step % every == 0:
            _expect(job, seen, data, step, context)
        if step == job.train.reset_probes_at:
            model.reset_probes(_reset_seed(job.seed))
            optimizers.reset_probes()
        batch = _batch(job, seen, data, step, context, device=device)
        losses: dict[str, Tensor] = module(batch)
        draws = batch.draws
        del batch  # its features must be gone before those of the next one are read
        optimizers.zero_grad()
        torch.autograd.backward(losses["total"])
        optimizers.step()
        model.follow()
        done = step + 1
        if done % job.train.log_every == 0 or done == steps:
            rate = (done - first) / (time.monotonic() - started_s)
            _tell(context, done, rate, losses, draws.digest())
        if done % every == 0 or done == steps:
            context.checkpoint(done, _Saver(model, optimizers, done))
    return model.eval()


@dataclass(frozen=True, slots=True)
class _Saver:
    model: Trainable
    optimizers: Optimizers
    step: int

    def __call__(self, folder: str) -> None:
        save_state(folder, self.model, self.optimizers, {"step": self.step})


def new_model(job: TrainJob, data: TrainData) -> Trainable:
    """Return what is trained, as it is before the first step."""
    return Trainable(
        job,
        channels=data.channels,
        num_classes=data.num_classes,
        shifts=data.shifts,
        whitening=data.whitening,
        concepts=data.concepts,
    )


def _expect(
    job: TrainJob, seen: SeenFeatures, data: TrainData, step: int, context: TrainContext
) -> None:
    """Announce the reads of the steps up to the next checkpoint, where a visit reads others."""
    every = job.train.checkpoint_every
    end = min(job.train.steps, step - step % every + every)
    seen.expect(StepReads(job, step, end, _rows(job, context), data.neighbors))


def _rows(job: TrainJob, context: TrainContext) -> slice:
    """Return this worker's rows of each batch."""
    share = job.train.batch // context.num_workers
    return slice(context.rank * share, (context.rank + 1) * share)


def _batch(
    job: TrainJob,
    seen: SeenFeatures,
    data: TrainData,
    step: int,
    context: TrainContext,
    *,
    device: str,
) -> StepBatch:
    draws = draw_step(job, step, neighbors_VN=data.neighbors, channels=data.channels)
    rows = _rows(job, context)
    labels = None
    if data.labels is not None and not job.train.linear_refit:
        found, points = data.labels.read(draws.anchors[rows], draws.pixels[rows], data.side)
        labels = (found.to(device), points.to(device))
    optional = read_optional(
        draw_optional(job, step, channels=data.channels, side=data.side),
        rows,
        (draws.anchors[rows], draws.neighbors[rows]),
        pixels=data.pixels,
        labels=data.labels if needs_labels(job.loss) else None,
        side=data.side,
        device=device,
    )
    return StepBatch(
        # In the order of `StepReads`: a source may compute ahead in it.
        anchor=seen.read(draws.anchors[rows]),
        neighbor=seen.read(draws.neighbors[rows]),
        draws=draws,
        rows=rows,
        labels=labels,
        optional=optional,
    )


def _reset_seed(seed: int) -> int:
    # A stream of its own: the new weights differ from the first ones.
    return int(np.random.SeedSequence([seed, _RESET_STREAM]).generate_state(1)[0])


def _tell(
    context: TrainContext, step: int, rate: float, losses: dict[str, Tensor], batch: str
) -> None:
    values = {
        key if "/" in key else f"loss/{key}": round(float(value.detach()), 6)
        for key, value in losses.items()
    }
    values["throughput/steps_per_s"] = round(rate, 3)
    context.event("train/step", step=step, batch=batch, **values)


class LocalContext:
    """One worker without Ray: no resume, checkpoints are dropped, events are kept in a list."""

    rank = 0
    num_workers = 1

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def resume_folder(self) -> str | None:
        """Return nothing: this context keeps no checkpoints."""
        return None

    def checkpoint(self, step: int, save: Callable[[str], None]) -> None:
        """Drop the checkpoint."""

    def event(self, name: str, **values: Any) -> None:
        """Keep the event."""
        self.events.append({"event": name, **values})

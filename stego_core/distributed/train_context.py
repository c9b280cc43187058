"""The surroundings of a training loop that runs under Ray Train."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import ray.train
from ray.train import Checkpoint

from stego_core.distributed.train_progress import events_name
from stego_core.storage import fs
from stego_core.storage.retry import retried
from stego_core.storage.run import RunDirectory
from stego_core.training.state import find_checkpoint
from stego_core.training.workers import from_first_worker


class RayContext:
    """The training loop's view of Ray Train (see `TrainContext`)."""

    def __init__(self, run_uri: str, *, starts_uri: str) -> None:
        context = ray.train.get_context()
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        # One worker looks: an upload that a dying worker had begun may end between two looks.
        self._resume = from_first_worker(lambda: find_checkpoint(starts_uri))
        self._run = RunDirectory(run_uri, job="train", events=events_name(run_uri))

    def resume_folder(self) -> str | None:
        """Return the newest checkpoint of all starts that was whole when this worker started.

        Ray Train knows only those that its controller had heard of when a worker died.
        """
        return self._resume

    def checkpoint(self, step: int, save: Callable[[str], None]) -> None:
        """Hand a checkpoint to Ray Train; redoing a step overwrites its folder."""
        name = f"step-{step:08d}"
        if self.rank:
            ray.train.report({"step": step}, checkpoint_dir_name=name)
            return
        with tempfile.TemporaryDirectory() as folder:
            save(folder)
            ray.train.report(
                {"step": step},
                Checkpoint.from_directory(folder),
                checkpoint_dir_name=name,
                checkpoint_upload_fn=None if fs.is_local(self._run.uri) else _upload,
            )

    def event(self, name: str, **values: Any) -> None:
        """Append to the run's events, on rank 0 only."""
        if self.rank == 0:
            self._run.event(name, **values)


def _upload(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Copy a checkpoint as Ray Train does, but wait for a store that is away."""
    storage = ray.train.get_context().get_storage()
    return retried(lambda: storage.persist_current_checkpoint(checkpoint, name))

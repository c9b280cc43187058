"""A training that is lost again and again goes on as long as there is something to go on from."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
import ray.train

from stego_core.config.schema import TrainJob
from stego_core.distributed import train
from stego_core.distributed.cluster import ActorPlan
from stego_core.errors import CheckpointError, ClusterError
from stego_core.model.checkpoint import save_tensors
from stego_core.storage import fs
from stego_core.storage.run import RunDirectory
from stego_core.training.state import find_checkpoint


class Trainer:
    """Stands for Ray's: each start leaves a checkpoint or none, and fails unless it is the last."""

    def __init__(self, *steps: int | None, error: Exception | None = None) -> None:
        self._steps, self._error, self.resumed = list(steps), error, []

    def __call__(self, worker, *, train_loop_config, run_config, **_):
        self.resumed.append(find_checkpoint(train_loop_config["starts_uri"]))
        self._start = fs.join(run_config.storage_path, run_config.name)
        return self

    def fit(self):
        step = self._steps.pop(0)
        folder = fs.join(self._start, f"step-{step or 0:08d}")
        if step is not None:
            save_tensors(folder, "state" if self._steps else "model", {}, {"step": step})
        if self._steps:
            failures = {0: self._error or RuntimeError("the worker's node died")}
            raise ray.train.WorkerGroupError("rank 0", failures)


def fit(trainer, tmp_path, monkeypatch):
    plan = ActorPlan(1, num_cpus=1, num_gpus=0, threads=1)
    monkeypatch.setattr(train, "plan_actors", lambda *_, **__: plan)
    monkeypatch.setattr(train, "TorchTrainer", trainer)
    run = RunDirectory(str(tmp_path), job="train")
    lease = SimpleNamespace(check=lambda: None)
    return train._fit(TrainJob(), run, SimpleNamespace(is_stored=True), lease, key="k")


def test_each_start_goes_on_from_the_newest_checkpoint_of_all(tmp_path, monkeypatch):
    trainer = Trainer(20, 40, 60, 80)
    folder = fit(trainer, tmp_path, monkeypatch)
    starts = tmp_path / "checkpoints" / "train-k"
    assert folder == str(starts / "start-003" / "step-00000080")
    assert trainer.resumed == [
        None,
        *(str(starts / f"start-{n:03d}" / f"step-{20 * (n + 1):08d}") for n in range(3)),
    ]
    assert [path.name for path in starts.iterdir()] == ["start-003"]


def test_a_start_that_gets_no_further_is_the_last(tmp_path, monkeypatch):
    trainer = Trainer(20, None, 60, 80)
    with pytest.raises(ClusterError, match="training failed"):
        fit(trainer, tmp_path, monkeypatch)
    assert len(trainer.resumed) == 2


def test_an_error_of_ours_is_not_tried_again(tmp_path, monkeypatch):
    trainer = Trainer(20, 40, error=CheckpointError("the neighbours are of another run"))
    with pytest.raises(CheckpointError, match="of another run"):
        fit(trainer, tmp_path, monkeypatch)
    assert len(trainer.resumed) == 1


def test_a_model_that_ray_never_heard_of_is_taken_over(tmp_path, monkeypatch):
    class Late(Trainer):
        """Writes everything, and then its node dies."""

        def fit(self):
            self._steps = [None]
            super().fit()
            folder = fs.join(self._start, "step-00000081")
            save_tensors(folder, "model", {}, {})
            raise ray.train.WorkerGroupError("rank 0", {0: RuntimeError("its node died")})

    trainer = Late()
    folder = fit(trainer, tmp_path, monkeypatch)
    assert folder.endswith("start-000/step-00000081")
    assert len(trainer.resumed) == 1


class Away(Trainer):
    """The store is away when Ray's controller looks at it, for the first of the starts."""

    def __init__(self, *steps, says, times):
        super().__init__(*steps)
        self._says, self._times = says, times

    def fit(self):
        if self._times:
            self._times -= 1
            error = ray.exceptions.ActorDiedError()
            error.error_msg = f"The actor died in its creation task\n{self._says}"
            raise error
        super().fit()


def test_a_store_that_is_away_when_ray_train_starts_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("stego_core.storage.retry._FIRST_WAIT_S", 0.001)
    says = "OSError: AWS Error NETWORK_CONNECTION during PutObject operation"
    trainer = Away(80, says=says, times=3)
    assert fit(trainer, tmp_path, monkeypatch).endswith("step-00000080")
    assert len(trainer.resumed) == 4


def test_a_store_that_refuses_ray_train_ends_the_training(tmp_path, monkeypatch):
    trainer = Away(80, says="OSError: AWS Error ACCESS_DENIED during PutObject", times=3)
    with pytest.raises(ClusterError, match="training failed: AWS Error ACCESS_DENIED"):
        fit(trainer, tmp_path, monkeypatch)
    assert len(trainer.resumed) == 1


def test_a_controller_that_dies_of_something_else_is_not_started_again(tmp_path, monkeypatch):
    trainer = Away(80, says="ValueError: of our own", times=3)
    with pytest.raises(ray.exceptions.ActorDiedError):
        fit(trainer, tmp_path, monkeypatch)
    assert len(trainer.resumed) == 1


def test_a_full_disk_keeps_its_name(tmp_path, monkeypatch):
    """`run_job` tells what to do about it, and that it is no failure of the cluster."""

    class Full(Trainer):
        def fit(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        fit(Full(80), tmp_path, monkeypatch)
    assert caught.value.errno == errno.ENOSPC

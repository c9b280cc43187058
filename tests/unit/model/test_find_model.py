"""Which folder a job takes its model from, and what it says of one that holds none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stego_core.errors import CheckpointError
from stego_core.model.checkpoint import find_model, save_tensors

STEP = "checkpoints/train-0123456789abcdef/start-000/step-00000300"


def leave(folder: Path, name: str) -> str:
    save_tensors(str(folder), name, {"head.weight": torch.zeros(2)}, {"version": 1})
    return str(folder)


def test_a_model_is_found_from_its_run_directory_and_from_its_own_folder(tmp_path: Path) -> None:
    model = leave(tmp_path / "run" / "model", "model")
    leave(tmp_path / "run" / STEP, "state")
    assert find_model(str(tmp_path / "run")) == model
    assert find_model(model) == model


def test_a_checkpoint_that_holds_a_model_is_one_whatever_else_it_holds(tmp_path: Path) -> None:
    step = leave(tmp_path / "run" / STEP, "model")
    assert find_model(step) == step
    leave(Path(step), "state")
    assert find_model(step) == step


@pytest.mark.parametrize("left", ["state.json", "state.safetensors"])
def test_a_training_state_is_named_as_one_and_its_run_directory_as_the_model(
    tmp_path: Path, left: str
) -> None:
    """Not refused with the advice to train into that folder, which would bury a checkpoint."""
    step = leave(tmp_path / "run" / STEP, "state")
    for path in Path(step).iterdir():
        if path.name != left:  # a copy may hold either file
            path.unlink()
    with pytest.raises(CheckpointError) as caught:
        find_model(step)
    assert str(caught.value) == (
        f"{step} holds a state that a training continues from, not a model: "
        f"give the run directory, {tmp_path / 'run'}"
    )


def test_a_state_outside_of_any_run_directory_is_still_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a model: give the run directory$"):
        find_model(leave(tmp_path / "copied", "state"))


def test_a_folder_without_model_and_state_is_where_one_may_be_trained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"jobs/train.py --out {tmp_path}$"):
        find_model(str(tmp_path))

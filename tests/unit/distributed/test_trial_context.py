"""What a trial keeps while it runs, so that a killed one goes on."""

from pathlib import Path

from stego_core.distributed.tune_trial import _Context
from stego_core.model.checkpoint import save_tensors


def save(folder: str) -> None:
    save_tensors(folder, "state", {}, {"step": 1})


def test_the_two_newest_checkpoints_are_kept_and_the_newest_is_continued(tmp_path: Path) -> None:
    context = _Context(str(tmp_path))
    assert context.resume_folder() is None
    assert context.reached() == 0
    for step in (10, 20, 30):
        context.checkpoint(step, save)
    assert sorted(path.name for path in (tmp_path / "start").iterdir()) == [
        "step-00000020",
        "step-00000030",
    ]
    assert context.reached() == 30


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path: Path) -> None:
    context = _Context(str(tmp_path))
    context.checkpoint(10, save)
    context.checkpoint(20, save)
    (tmp_path / "start" / "step-00000020" / "state.json").unlink()
    assert context.reached() == 10

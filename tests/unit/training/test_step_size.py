"""How large the tensors are that a training step makes."""

from __future__ import annotations

import pytest
import torch
from factories import FakeFeatures, random_maps, train_data, train_job
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stego_core.training.loop import LocalContext, train

CHANNELS = 8


class Largest(TorchDispatchMode):
    """Notes the most values that a tensor had, of all that operators return, backward ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                # What lies in memory: an expanded view is no larger than what it shows.
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.values = max(self.values, size)
        return out


def largest(batch: int, side: int, **settings) -> int:
    """The values of the largest tensor of one training step on maps of side² cells."""
    job = train_job(train={"steps": 1, "batch": batch}, **settings)
    maps = random_maps(2 * batch + 1, CHANNELS, side, side)
    data = train_data(2 * batch + 1, features=FakeFeatures(maps))
    with Largest() as found:
        train(job, data, LocalContext(), device="cpu")
    return found.values


def test_a_product_of_all_cells_with_all_would_be_noticed_forward_and_backward():
    cells = torch.ones(50, 2, requires_grad=True)
    with Largest() as forward:
        product = cells @ cells.T
    assert forward.values == 50**2
    with Largest() as backward:
        product.square().sum().backward()
    assert backward.values == 50**2


@pytest.mark.parametrize(("batch", "side"), [(4, 12), (8, 12), (8, 24)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": {"pointwise": False}},
        {"loss": {"alignment": 1.0, "crf": 1.0, "reconstruction": 1.0}},
        {"loss": {"energy": "smooth"}},
        {"head": {"whiten": 4}},
    ],
)
def test_no_tensor_of_a_step_is_larger_than_the_features_of_its_batch(settings, batch, side):
    cells = batch * side**2
    found = largest(batch, side, **settings)
    assert found <= CHANNELS * cells
    assert found < cells**2 / 50


@pytest.mark.parametrize("samples", [3, 11])
def test_the_loss_compares_sampled_points_only_whatever_the_grid(samples):
    batch = 4
    pairs = batch * samples**4
    for side in (12, 24):
        found = largest(batch, side, loss={"samples": samples})
        assert found == max(pairs, CHANNELS * batch * side**2)


def test_attention_compares_the_cells_of_one_view_not_of_the_batch():
    found = [largest(batch, 12, head={"kind": "transformer"}) for batch in (4, 8)]
    assert found[1] == 2 * found[0]

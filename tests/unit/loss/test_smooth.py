from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import options_reference as reference
from reference import stego_reference

from stego_core.errors import ShapeError
from stego_core.loss.smooth import assign_softly, prototype_loss, smoothness_energy


def drawn(*shape, seed):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).requires_grad_()


def test_the_assignments_are_the_softmax_of_cosines():
    code, prototypes = drawn(2, 3, 2, 2, seed=0), drawn(4, 3, seed=1)
    found = assign_softly(code, prototypes).detach().numpy()
    for n, i, j in np.ndindex(2, 2, 2):
        expected = reference.soft_assignment(
            code[n, :, i, j].detach().numpy(), prototypes.detach().numpy()
        )
        np.testing.assert_allclose(found[n, :, i, j], expected, rtol=1e-10)


@pytest.mark.parametrize("pointwise", [False, True])
def test_the_energy_is_the_formula_for_every_pair(pointwise):
    f1, f2 = drawn(2, 3, 2, 2, seed=0).detach(), drawn(2, 3, 2, 2, seed=1).detach()
    p1, p2 = (drawn(2, 4, 2, 2, seed=seed).detach().softmax(1) for seed in (2, 3))
    found = smoothness_energy((f1, f2), (p1, p2), shift=0.1, pointwise=pointwise)
    target = torch.from_numpy(pairs(f1, f2))
    if pointwise:
        target = target - target.mean((3, 4), keepdim=True) + target.mean()
    expected = (target - 0.1) * (1 - torch.from_numpy(pairs(p1, p2)))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def pairs(a, b):
    a, b = a.numpy(), b.numpy()
    out = np.zeros((len(a), *a.shape[2:], *b.shape[2:]))
    for n, h, w, i, j in np.ndindex(*out.shape):
        out[n, h, w, i, j] = stego_reference.cosine(a[n, :, h, w], b[n, :, i, j])
    return out


def test_like_features_pull_assignments_together_and_unlike_ones_apart():
    code = drawn(1, 2, 1, 2, seed=4)
    prototypes = torch.eye(2, dtype=torch.float64)
    for alike, sign in ((True, -1), (False, 1)):
        other = [1.0, 0.0] if alike else [-1.0, 0.0]
        features = torch.tensor([[1.0, 0.0], other], dtype=torch.float64).T[None, :, None]
        where = assign_softly(code, prototypes)
        energy = smoothness_energy(
            (features, features), (where, where), shift=0.5, pointwise=False
        ).sum()
        (gradient,) = torch.autograd.grad(energy, code)
        moved = assign_softly(code - 1e-4 * gradient, prototypes)
        cosines = [
            F.cosine_similarity(one[0, :, 0, 0], one[0, :, 0, 1], 0) for one in (where, moved)
        ]
        assert torch.sign(cosines[0] - cosines[1]) == sign


def test_the_prototype_loss_is_the_cross_entropy_to_the_teachers_nearest():
    code, student, teacher = drawn(2, 3, 2, 2, seed=0), drawn(4, 3, seed=1), drawn(4, 3, seed=2)
    values = []
    for n, i, j in np.ndindex(2, 2, 2):
        one = code[n, :, i, j].detach().numpy()
        near = [stego_reference.cosine(one, row) for row in teacher.detach().numpy()]
        logits = np.array([stego_reference.cosine(one, row) for row in student.detach().numpy()])
        values.append(np.log(np.exp(logits).sum()) - logits[int(np.argmax(near))])
    loss = prototype_loss(code, student, teacher)
    assert loss.item() == pytest.approx(np.mean(values), abs=1e-12)
    loss.backward()
    assert student.grad is not None
    assert code.grad is None
    assert teacher.grad is None


def test_the_gradient_of_the_energy_reaches_the_code_alone():
    code, prototypes = drawn(2, 3, 2, 2, seed=0), drawn(4, 3, seed=1)
    assign_softly(code, prototypes)[:, 0].sum().backward()
    assert code.grad is not None
    assert prototypes.grad is None


def test_prototypes_of_another_number_than_the_teachers_are_refused():
    with pytest.raises(ShapeError, match="teacher"):
        prototype_loss(torch.ones(1, 3, 1, 1), torch.ones(4, 3), torch.ones(5, 3))

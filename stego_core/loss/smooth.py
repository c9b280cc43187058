"""SmooSeg's energy: points with like features should be assigned to the same prototype.

Letters in names: B images, C feature channels, K code channels, N prototypes, S points along each
axis of a sample, h w grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.errors import ShapeError
from stego_core.loss.correspondence import centre, correspondence
from stego_core.loss.cosine import unit_cells

# The constants of the published code.
TEMPERATURE = 0.1
PROTOTYPE_DECAY = 0.998


def assign_softly(code_BKhw: Tensor, prototypes_NK: Tensor) -> Tensor:
    """Compute softmax(cosine / TEMPERATURE) of codes and prototypes.

    Args:
        code_BKhw: code, (B, K, h, w); the gradient flows to it alone.
        prototypes_NK: directions, (N, K).

    Returns:
        Assignments that sum to 1 over N, (B, N, h, w).
    """
    return torch.softmax(_cosines(code_BKhw, prototypes_NK.detach()) / TEMPERATURE, dim=1)


def smoothness_energy(
    features: tuple[Tensor, Tensor],
    assignments: tuple[Tensor, Tensor],
    *,
    shift: float | Tensor,
    pointwise: bool = True,
    global_mean: Tensor | None = None,
) -> Tensor:
    """Compute (F - b) (1 - cosine of assignments) of every pair of points.

    Pairs whose features are more alike than the shift pay for different assignments, the others
    are paid for them.

    Args:
        features: frozen features at the points of two images, (B, C, S, S) each; no gradient.
        assignments: `assign_softly` of the codes there, (B, N, S, S) each.
        shift: b.
        pointwise: centre the feature correspondences, see `correspondence.centre`.
        global_mean: see there.

    Returns:
        Energy of every pair, (B, S, S, S, S); the caller reduces it.
    Source: Lan et al., "SmooSeg: Smoothness Prior for Unsupervised Semantic Segmentation",
        NeurIPS 2023, and its published code.
    """
    with torch.no_grad():
        target = correspondence(*features)
        if pointwise:
            target = centre(target, global_mean)
        target = target - shift
    return target * (1 - correspondence(*assignments))


def prototype_loss(code_BKhw: Tensor, student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """Compute the cross-entropy of the student's cosines to the teacher's nearest prototype.

    The gradient reaches the student only, never the code, as in the published code.

    Args:
        code_BKhw: code, (B, K, h, w).
        student_NK: trained prototypes, (N, K).
        teacher_NK: their moving average, (N, K).

    Returns:
        The mean over all cells, a scalar.

    Raises:
        ShapeError: if student and teacher differ in shape.
    """
    if student_NK.shape != teacher_NK.shape:
        raise ShapeError(
            f"prototypes {tuple(student_NK.shape)} and their teacher {tuple(teacher_NK.shape)}: "
            "give (N, K) twice"
        )
    code = code_BKhw.detach()
    nearest = _cosines(code, teacher_NK.detach()).argmax(1)
    return F.cross_entropy(_cosines(code, student_NK), nearest)


def _cosines(code_BKhw: Tensor, prototypes_NK: Tensor) -> Tensor:
    directions = F.normalize(prototypes_NK, dim=1)
    return torch.einsum("bkhw,nk->bnhw", unit_cells(code_BKhw), directions.to(code_BKhw))

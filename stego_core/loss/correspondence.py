"""The correspondence loss of STEGO and what it draws: points of a map, partners of a batch.

Letters in names: B images, C channels, h w grid, S points along each axis of a sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.errors import ShapeError

# Below this length a vector counts as zero: it keeps a cosine of 0 with everything.
_SMALLEST_NORM = 1e-10
_STABLE_MAX = 0.8


def sample_points(maps_BChw: Tensor, coords_BSS2: Tensor) -> Tensor:
    """Sample maps bilinearly at points; the two point axes come out swapped.

    The swap is the original's: `result[..., i, j]` is the value at `coords[:, j, i]`. The loss
    doesn't depend on it, as long as features and code are both sampled here.

    Args:
        maps_BChw: maps of any kind, (B, C, h, w).
        coords_BSS2: points as (x, y) in [-1, 1], (B, S, S, 2). -1 and 1 are the centres of the
            first and last cell; points beyond them take the border's value.

    Returns:
        Values at the points, (B, C, S, S), in the wider of the two dtypes.

    Raises:
        ShapeError: if the shapes aren't as above or B differs.
    Source: Hamilton et al. 2022, section 3; `align_corners=True` as in the original code.
    """
    if maps_BChw.ndim != 4 or coords_BSS2.ndim != 4 or coords_BSS2.shape[-1] != 2:
        raise ShapeError(
            f"maps {tuple(maps_BChw.shape)} and points {tuple(coords_BSS2.shape)}: give "
            "(B, C, h, w) and (B, S, S, 2)"
        )
    if len(maps_BChw) != len(coords_BSS2):
        raise ShapeError(
            f"{len(maps_BChw)} maps but {len(coords_BSS2)} point sets: give one set for each map"
        )
    dtype = torch.promote_types(maps_BChw.dtype, coords_BSS2.dtype)
    return F.grid_sample(
        maps_BChw.to(dtype),
        coords_BSS2.transpose(1, 2).to(dtype),
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )


def correspondence(a_BCSS: Tensor, b_BCSS: Tensor) -> Tensor:
    """Compute the cosine of every position of `a` with every position of `b`, image by image.

    Args:
        a_BCSS: first maps, (B, C, h, w); need not be normalised.
        b_BCSS: second maps, (B, C, i, j); need not be normalised, may be of another size.

    Returns:
        Cosines in [-1, 1], (B, h, w, i, j), float32 or wider; 0 where a vector is zero.

    Raises:
        ShapeError: if the maps aren't four-dimensional or disagree in B or C.
    Source: Hamilton et al. 2022, section 3.1, the correspondence tensor.
    """
    _check_pair(a_BCSS, b_BCSS)
    rows = _unit(a_BCSS).flatten(2).transpose(1, 2)
    columns = _unit(b_BCSS).flatten(2)
    batch, (h, w), (i, j) = len(a_BCSS), a_BCSS.shape[2:], b_BCSS.shape[2:]
    return torch.bmm(rows, columns).view(batch, h, w, i, j)


def correspondence_mean(a_BCSS: Tensor, b_BCSS: Tensor) -> Tensor:
    """Compute the mean of `correspondence(a, b)` without building that tensor.

    The mean over all pairs of positions is the dot product of the two mean unit vectors. Workers
    that share a batch average this over all ranks and give it to the loss as `global_mean`.

    Args:
        a_BCSS: first maps, (B, C, h, w).
        b_BCSS: second maps, (B, C, i, j).

    Returns:
        The mean cosine of the batch, a scalar.

    Raises:
        ShapeError: if the maps aren't four-dimensional or disagree in B or C.
    """
    _check_pair(a_BCSS, b_BCSS)
    means = _unit(a_BCSS).flatten(2).mean(2) * _unit(b_BCSS).flatten(2).mean(2)
    return means.sum(1).mean()


def centre(correspondence: Tensor, global_mean: Tensor | None = None) -> Tensor:
    """Give every point of the first image the same mean correspondence: that of the batch.

    Args:
        correspondence: cosines, (B, h, w, i, j).
        global_mean: scalar to use instead of this tensor's own mean. Workers that share a batch
            pass the mean over all ranks, so that the result doesn't depend on their number.

    Returns:
        Centred correspondences, (B, h, w, i, j); their mean over (i, j) is `global_mean`.
    Source: Hamilton et al. 2022, section 3.2, spatial centring. The original code adds the batch
        mean back, which the paper doesn't say; so shifts stay on the scale of raw cosines.
    """
    if global_mean is None:
        global_mean = correspondence.mean()
    return correspondence - correspondence.mean(dim=(3, 4), keepdim=True) + global_mean


def correspondence_loss(
    features_a: Tensor,
    features_b: Tensor,
    code_a: Tensor,
    code_b: Tensor,
    *,
    shift: float | Tensor,
    pointwise: bool = True,
    zero_clamp: bool = True,
    stabilize: bool = False,
    global_mean: Tensor | None = None,
) -> Tensor:
    """Penalise code similarity that disagrees with feature similarity.

    Args:
        features_a: frozen features at the points of the first image, (B, C, S, S); need not be
            normalised. They get no gradient.
        features_b: the same of the second image.
        code_a: code at the points of the first image, (B, K, S, S).
        code_b: the same of the second image; the gradient flows to both.
        shift: b of the paper; correspondences above it attract, below it repel.
        pointwise: centre the feature correspondences, see `centre`.
        zero_clamp: count negative code correspondences as 0, without gradient.
        stabilize: count code correspondences above 0.8 as 0.8, without gradient.
        global_mean: see `centre`; not used without `pointwise`.

    Returns:
        Loss of every pair of points, (B, S, S, S, S); the caller reduces it.

    Raises:
        ShapeError: if features and code disagree in B or in their grid, or a pair in B or C.
    Source: Hamilton et al. 2022, section 3.2; the clamp at 0.8 is the original code's.
    """
    for features, code in ((features_a, code_a), (features_b, code_b)):
        if features.shape[2:] != code.shape[2:] or len(features) != len(code):
            raise ShapeError(
                f"features {tuple(features.shape)} and code {tuple(code.shape)}: sample both at "
                "the same points"
            )
    with torch.no_grad():
        target = correspondence(features_a, features_b)
        if pointwise:
            target = centre(target, global_mean)
        penalty = target.neg_().add_(shift)  # in place: these tensors are most of a step's time
    similarity = correspondence(code_a, code_b)
    if zero_clamp:
        similarity = F.relu(similarity)
    if stabilize:
        similarity = similarity.clamp(max=_STABLE_MAX)
    return similarity * penalty


def derangement(count: int, generator: torch.Generator) -> Tensor:
    """Draw who is paired with whom in a batch: a permutation without fixed points.

    Every such permutation is equally likely: permutations are drawn until one has no fixed
    point, 2.7 times on average.

    Args:
        count: images of the batch, at least 1. A single image has no partner: [0] is returned.
        generator: source of the randomness; the result lies on its device.

    Returns:
        For each position the index of its partner, (count,) int64.

    Raises:
        ShapeError: if the batch is empty.
    Source: replaces the original's `super_perm`, which is no permutation; see
        `overlapping_permutation`.
    """
    _check_count(count)
    device = generator.device
    own = torch.arange(count, device=device)
    partners = torch.randperm(count, generator=generator, device=device)
    while count > 1 and bool((partners == own).any()):
        partners = torch.randperm(count, generator=generator, device=device)
    return partners


def overlapping_permutation(count: int, generator: torch.Generator) -> Tensor:
    """Draw partners as the original does: no fixed point, but some images are drawn twice.

    A random permutation whose fixed points are moved one further. Kept for comparison.

    Args:
        count: images of the batch, at least 1. A single image is paired with itself.
        generator: source of the randomness; the result lies on its device.

    Returns:
        For each position the index of its partner, (count,) int64; not a permutation in general.

    Raises:
        ShapeError: if the batch is empty.
    Source: `super_perm` of the original code.
    """
    _check_count(count)
    device = generator.device
    own = torch.arange(count, device=device)
    partners = torch.randperm(count, generator=generator, device=device)
    return (partners + (partners == own)) % count


def _unit(maps_BChw: Tensor) -> Tensor:
    # Centring and shifting take differences of cosines, for which half precision is too coarse.
    wide = maps_BChw.to(torch.promote_types(maps_BChw.dtype, torch.float32))
    return F.normalize(wide, dim=1, eps=_SMALLEST_NORM)


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.ndim != 4 or b.ndim != 4 or a.shape[:2] != b.shape[:2]:
        raise ShapeError(
            f"maps {tuple(a.shape)} and {tuple(b.shape)} can't be compared: give (B, C, h, w) "
            "with the same B and C"
        )


def _check_count(count: int) -> None:
    if count < 1:
        raise ShapeError(f"a batch of {count} images has no partners to draw: give at least 1")

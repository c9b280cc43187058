"""The boosting stage after the refit: clusters are fitted to mask proposals of the views.

Letters in names: K code channels, M clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stego_core.model.primaps import boost_prototypes, propose_masks
from stego_core.training.views import Reads

_STREAM = 9
_VIEWS = 512  # all their tokens are held: 70 MB of codes for the default views
_READ_VIEWS = 32


@dataclass(frozen=True, slots=True)
class ViewMaps:
    """What the boost needs of some views, maps of one grid (B, channels, h, w).

    Attributes:
        seen: as the head sees them; the masks are proposed on these.
        codes: smoothed and projected, as the clusters are found on.
    """

    seen: Tensor
    codes: Tensor


def boost_clusters(
    read: Callable[[np.ndarray], ViewMaps],
    start_MK: Tensor,
    *,
    num_views: int,
    seed: int,
    expect: Callable[[Reads], None],
) -> Tensor:
    """Fit clusters to the mask proposals of at most 512 views; no label is looked at.

    Args:
        read: views (B,) to their maps.
        start_MK: clusters to start from, (M, K).
        num_views: of the data set.
        seed: of the drawn views and of the order in which they are fitted.
        expect: told beforehand what `read` will be called with (see `FeatureSource`).

    Returns:
        Unit rows, (M, K) float32.
    """
    generator = np.random.default_rng([seed, _STREAM])
    views = np.sort(generator.choice(num_views, min(_VIEWS, num_views), replace=False))
    codes, masks = [], []
    blocks = [views[start : start + _READ_VIEWS] for start in range(0, len(views), _READ_VIEWS)]
    expect(blocks)
    for block in blocks:
        maps = read(block)
        codes.append(maps.codes.flatten(2).transpose(1, 2).cpu())
        masks.append(propose_masks(maps.seen).flatten(1).cpu())
    return boost_prototypes(torch.cat(codes), torch.cat(masks), start_MK.cpu(), seed=seed)

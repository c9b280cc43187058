"""Matched tokens of neighbouring views: the correspondences that consistency is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stego_core.model.smoothing import smooth_code
from stego_core.neighbors.search import NONE
from stego_core.training.views import Reads

_STREAM = 5
ANCHORS = 512  # views that look for matches in their neighbours
NEIGHBORS = 4
_TOKENS = 160  # drawn from each view
_READ_VIEWS = 64


@dataclass(frozen=True, slots=True)
class Matches:
    """Tokens that were drawn, and those among them that match.

    Attributes:
        tokens: (T, D) all tokens, unit length, smoothed where that was asked for.
        first: (P, D) matched tokens, unit length; P is 0 where no view has a neighbour.
        second: (P, D) their counterparts in the neighbours.
    """

    tokens: Tensor
    first: Tensor
    second: Tensor

    @property
    def differences(self) -> Tensor:
        """Return what matched tokens disagree in."""
        return self.first - self.second


def match_tokens(
    read: Callable[[np.ndarray], Tensor],
    neighbors_VN: np.ndarray,
    *,
    seed: int,
    temperature: float = 0.0,
    expect: Callable[[Reads], None] | None = None,
) -> Matches:
    """Match random tokens of views with those of their nearest neighbours.

    Two tokens match if each is the other's most similar one, by cosine.

    Args:
        read: views to maps (B, D, h, w); called once for each view that takes part.
        neighbors_VN: (V, N) views, `NONE` where a view has fewer.
        seed: of the draw, which depends on nothing else but the shapes.
        temperature: at which `tokens`, not those that are matched, are smoothed inside their
            view; 0 leaves them.
        expect: told beforehand what `read` will be called with (see `FeatureSource`).
    """
    generator = np.random.default_rng([seed, _STREAM])
    num_views = len(neighbors_VN)
    anchors = np.sort(generator.choice(num_views, min(ANCHORS, num_views), replace=False))
    pairs = [
        (int(anchor), int(other))
        for anchor in anchors
        for other in neighbors_VN[anchor, :NEIGHBORS]
        if other not in (NONE, anchor)
    ]
    needed = np.unique(np.concatenate([anchors, np.array(pairs, np.int64).reshape(-1)]))
    tokens: dict[int, Tensor] = {}
    smoothed: list[Tensor] = []
    blocks = [needed[start : start + _READ_VIEWS] for start in range(0, len(needed), _READ_VIEWS)]
    if expect is not None:
        expect(blocks)
    for block in blocks:
        maps = F.normalize(read(block).cpu(), dim=1)
        smooth = F.normalize(smooth_code(maps, maps, temperature=temperature), dim=1)
        cells, drawn = maps[0, 0].numel(), min(_TOKENS, maps[0, 0].numel())
        for view, sharp_Dhw, smooth_Dhw in zip(block, maps, smooth, strict=True):
            picks = torch.from_numpy(np.sort(generator.choice(cells, drawn, replace=False)))
            tokens[int(view)] = sharp_Dhw.flatten(1).T[picks]
            smoothed.append(smooth_Dhw.flatten(1).T[picks])
    everything = torch.cat(smoothed)
    nothing = everything[:0]
    matched = [_mutual(tokens[anchor], tokens[other]) for anchor, other in pairs]
    first, second = zip(*matched, strict=True) if matched else ((nothing,), (nothing,))
    return Matches(everything, torch.cat(first), torch.cat(second))


def _mutual(a_TD: Tensor, b_TD: Tensor) -> tuple[Tensor, Tensor]:
    cosines = a_TD @ b_TD.T
    best, back = cosines.argmax(1), cosines.argmax(0)
    is_mutual = back[best] == torch.arange(len(best))
    return a_TD[is_mutual], b_TD[best[is_mutual]]

"""CAUSE's second step: a codebook of concepts, a teacher head, and a bank of its codes.

Letters in names: b views of this worker, B of the whole batch, P = S x S points of a view, D
channels that the head sees, K code channels, M concepts, L places of a concept in the bank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stego_core.loss.concept import contrast_codes
from stego_core.loss.points import PointRows, sample_rows
from stego_core.model.head import Head
from stego_core.model.kmeans import spherical_kmeans
from stego_core.model.modularity import raise_modularity
from stego_core.training.ema import MovingAverage
from stego_core.training.workers import gather_rows, worker_rank

# Concepts of a codebook; CAUSE has 2048, which would take minutes to fit.
_CONCEPTS = 256
_TOKENS_PER_CONCEPT = 4
CODEBOOK_TOKENS = 20_000
_STEPS = 100
_DECAY = 0.99  # of the teacher, from CAUSE's published code
_PLACES = 16  # of each concept in the bank
_NEW_PLACES = 4  # of them that one step may take


def find_concepts(tokens_TD: Tensor, *, seed: int) -> Tensor:
    """Return a codebook of up to 256 concepts of features: unit rows, (M, D).

    They start at what k-means++ chooses among the tokens and raise the modularity of their graph.

    Args:
        tokens_TD: tokens as the head sees them; about `CODEBOOK_TOKENS` are enough.
        seed: of start and samples.
    """
    count = max(1, min(_CONCEPTS, len(tokens_TD) // _TOKENS_PER_CONCEPT))
    start = spherical_kmeans(tokens_TD, count, seed=seed, restarts=1, max_iterations=0)
    return raise_modularity(tokens_TD, start.centroids, seed=seed, steps=_STEPS)


class ConceptEnergy(nn.Module):
    """Contrast codes with a teacher's codes of this batch and of earlier ones.

    Args:
        head: the trained head; the teacher starts as its copy.
        concepts_MD: the codebook.
    """

    def __init__(self, head: Head, concepts_MD: Tensor) -> None:
        super().__init__()
        self.teacher = MovingAverage(head, _DECAY)
        self.register_buffer("concepts", F.normalize(concepts_MD, dim=1))
        count = len(concepts_MD)
        self.register_buffer("bank", torch.zeros(count, _PLACES, head.dim))
        self.register_buffer("stored", torch.zeros(count, dtype=torch.long))
        self._keys: tuple[Tensor, Tensor] | None = None

    def forward(
        self, features: Tensor, code: Tensor, points: PointRows, keep: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the energy of this worker's views, a scalar.

        Args:
            features: (b, D, h, w), as the head sees them.
            code: (b, K, h, w) of the trained head.
            points: of the views.
            keep: channel dropout of the teacher's head.
        """
        with torch.no_grad():
            taught = self.teacher.shadow(features, keep)
            own_ids_bP = self._name(_rows(features, points))
            own_keys_bPK = _rows(taught, points)
            ids = gather_rows(own_ids_bP).flatten()
            keys = gather_rows(own_keys_bPK).flatten(0, 1)
            near = self._likeness(own_ids_bP, ids)
            _exclude_self(near, worker_rank() * len(own_ids_bP))
            bank, bank_ids = self._banked()
        codes_bPK = _rows(code, points)
        losses = [contrast_codes(codes_bPK, keys, near)]
        if len(bank):
            losses.append(contrast_codes(codes_bPK, bank, self._likeness(own_ids_bP, bank_ids)))
        self._keys = ids, keys
        return torch.stack(losses).mean()

    @torch.no_grad()
    def follow(self, head: Head) -> None:
        """Move the teacher, and put the last keys into the bank; called after each step."""
        self.teacher.follow(head)
        if self._keys is None:
            return
        ids, keys = self._keys
        order = ids.argsort(stable=True)
        ids, keys = ids[order], keys[order]
        counts = ids.bincount(minlength=len(self.get_buffer("stored")))
        first = counts.cumsum(0) - counts
        ranks = torch.arange(len(ids), device=ids.device) - first[ids]
        ids, keys, ranks = (part[ranks < _NEW_PLACES] for part in (ids, keys, ranks))
        stored = self.get_buffer("stored")
        self.get_buffer("bank")[ids, (stored[ids] + ranks) % _PLACES] = keys
        stored += counts.clamp(max=_NEW_PLACES)
        self._keys = None

    def _name(self, features_bPD: Tensor) -> Tensor:
        """Return the concept of each point, (b, P) int64."""
        return (features_bPD @ self.get_buffer("concepts").T).argmax(2)

    def _likeness(self, ids_bP: Tensor, others_Q: Tensor) -> Tensor:
        """Return the cosines of the concepts, (b, P, Q)."""
        concepts = self.get_buffer("concepts")
        return (concepts @ concepts.T)[ids_bP][:, :, others_Q]

    def _banked(self) -> tuple[Tensor, Tensor]:
        """Return the keys of the bank, (Q, K), and their concepts, (Q,)."""
        bank, stored = self.get_buffer("bank"), self.get_buffer("stored")
        is_full = torch.arange(_PLACES, device=bank.device) < stored[:, None]
        return bank[is_full], is_full.nonzero()[:, 0]


def _rows(maps: Tensor, points: PointRows) -> Tensor:
    return sample_rows(maps, points).flatten(2).transpose(1, 2)


def _exclude_self(likeness_bPQ: Tensor, first_view: int) -> None:
    """Let no code count as its own key."""
    views, points = likeness_bPQ.shape[:2]
    places = torch.arange(points, device=likeness_bPQ.device)
    for view in range(views):
        likeness_bPQ[view, places, (first_view + view) * points + places] = torch.nan

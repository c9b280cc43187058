"""Features as teacher and head see them, kept between steps: a view is read and whitened once.

Legend: B views, C feature channels, D whitened channels, h w grid.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stego_core.training.views import FeatureSource, FromStore, Reads

# Of each worker, on the device: some 2000 views of 320 pixels, patches of 14 and 64 channels.
_KEPT_BYTES = 256 * 2**20


class SeenFeatures:
    """Features of another source, whitened on the device; those of a store are kept.

    Views are kept until they take `max_bytes`, and then those that are there stay: in epochs each
    view is read equally often, so no other choice would find more of them again. A source that
    computes ahead is read every time, because it counts on each read that was announced.

    Args:
        source: of the features.
        whiten: (B, C, h, w) → (B, D, h, w), each view by itself; no gradient flows through it.
        device: of torch.
        max_bytes: that kept views may take.
    """

    def __init__(
        self,
        source: FeatureSource,
        whiten: Callable[[Tensor], Tensor],
        *,
        device: str,
        max_bytes: int = _KEPT_BYTES,
    ) -> None:
        self._source, self._whiten, self._device = source, whiten, device
        self._room = max_bytes if isinstance(source, FromStore) else 0
        self._kept: dict[int, Tensor] = {}

    def expect(self, reads: Reads) -> None:
        """Tell the source."""
        self._source.expect(reads)

    def read(self, views: np.ndarray) -> Tensor:
        """Return (B, D, h, w) float32 on the device, channels last in memory."""
        if not self._room and not self._kept:
            return self._compute(views)
        wanted = [int(view) for view in views]
        missing = [view for view in dict.fromkeys(wanted) if view not in self._kept]
        found = {view: self._kept[view] for view in wanted if view in self._kept}
        if missing:
            rows = self._compute(np.array(missing)).permute(0, 2, 3, 1)
            for view, row in zip(missing, rows, strict=True):
                found[view] = row
                self._keep(view, row)
        return torch.stack([found[view] for view in wanted]).permute(0, 3, 1, 2)

    @torch.no_grad()
    def _compute(self, views: np.ndarray) -> Tensor:
        return self._whiten(self._source.read(views).to(self._device))

    def _keep(self, view: int, row_hwD: Tensor) -> None:
        if row_hwD.nbytes <= self._room:
            self._kept[view] = row_hwD.clone()  # a row of its own does not hold its batch
            self._room -= row_hwD.nbytes
        else:
            self._room = 0

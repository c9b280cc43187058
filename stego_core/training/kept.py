"""Features as teacher and head see them, kept between steps: a view is read and whitened once.

Legend: B views, C feature channels, D whitened channels, h w grid.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stego_core.model.whitening import Whitening
from stego_core.training.views import FeatureSource, FromStore, Reads

# Of each worker, on the device: some 2000 views of 320 pixels, patches of 14 and 64 channels.
_KEPT_BYTES = 256 * 2**20


class SeenFeatures:
    """Features of another source on the device, whitened if there is a whitening.

    Each view is whitened by itself, so that its bits depend on no other view. Those of a store are
    then kept until they take `max_bytes`, and those that are there stay: in epochs each view is
    read equally often, so no other choice would find more of them again. Other sources are read
    every time: a stream counts on each read that was announced, and what a backbone gives depends
    on the batch in its last bits.

    Args:
        source: of the features.
        whitening: on the device; None leaves features as they are, and keeps none.
        device: of torch.
        max_bytes: that kept views may take.
    """

    def __init__(
        self,
        source: FeatureSource,
        whitening: Whitening | None,
        *,
        device: str,
        max_bytes: int = _KEPT_BYTES,
    ) -> None:
        self._source, self._whitening, self._device = source, whitening, device
        self._room = max_bytes if whitening is not None and isinstance(source, FromStore) else 0
        self._kept: dict[int, Tensor] = {}

    def expect(self, reads: Reads) -> None:
        """Tell the source."""
        self._source.expect(reads)

    def read(self, views: np.ndarray) -> Tensor:
        """Return (B, D, h, w) float32 on the device, channels last in memory."""
        if self._whitening is None:
            return self._source.read(views).to(self._device)
        if not self._room and not self._kept:
            return _stacked(self._whitened(views))
        wanted = [int(view) for view in views]
        missing = [view for view in dict.fromkeys(wanted) if view not in self._kept]
        found = {view: self._kept[view] for view in wanted if view in self._kept}
        if missing:
            for view, row in zip(missing, self._whitened(np.array(missing)), strict=True):
                found[view] = row
                self._keep(view, row)
        return _stacked([found[view] for view in wanted])

    @torch.no_grad()
    def _whitened(self, views: np.ndarray) -> list[Tensor]:
        """Return (h, w, D) of each view."""
        assert self._whitening is not None  # noqa: S101 - callers have looked
        features = self._source.read(views).to(self._device)
        # Slices keep the strides of channels last, by which torch chooses its kernel.
        alone = (features[row : row + 1] for row in range(len(views)))
        return [self._whitening(one)[0].permute(1, 2, 0) for one in alone]

    def _keep(self, view: int, row_hwD: Tensor) -> None:
        if row_hwD.nbytes <= self._room:
            self._kept[view] = row_hwD
            self._room -= row_hwD.nbytes
        else:
            self._room = 0


def _stacked(rows_hwD: list[Tensor]) -> Tensor:
    return torch.stack(rows_hwD).permute(0, 3, 1, 2)
